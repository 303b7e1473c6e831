"""Random changes of image batches, within the compiled step: functions of the images and a seed, and of nothing else.

The seed is of step and rank (see step.py), so that a resumed training sees the same pictures as one that never stopped.
All functions take uint8 images in [0, 255], (batch, height, width, channels), and an int32 (2,) seed. What touches
pixels is compiled by XLA, which passes over them once where TensorFlow's kernels do so for each sum and product: a
third of the time on a CPU. Draws stay outside, since XLA has generators of its own.
"""

import math
from functools import partial

import tensorflow as tf

from hpcai_cli.errors import UsageError

_fused = partial(tf.function, jit_compile=True)


def warp(images: tf.Tensor, seed: tf.Tensor, *, size: tuple[int, int] | None = None, flip: bool = True,
         zoom: tuple[float, float] = (1.0, 1.0), stretch: float = 0.0, rotation: float = 0.0) -> tf.Tensor:
    """Cut a random part out of each image, mirrored and rotated at random, in one interpolation.

    Args:
        size: height and width of the result, the input's when None: training on small pictures costs less.
        flip: mirror half of the images.
        zoom: least and largest side of the part, as shares of the image's side; its place is random.
        stretch: largest change of the part's aspect ratio, 0.3 for up to 1.3 times as wide or as high.
        rotation: largest rotation either way, in degrees; what lies outside is mirrored in.

    Returns:
        uint8 (batch, *size, channels).
    """
    count, height, width = images.shape[0], images.shape[1], images.shape[2]
    out_height, out_width = size or (height, width)
    if min(out_height, out_width) < 1 or not 0 < zoom[0] <= zoom[1] <= 1:
        raise UsageError("an image cannot be cut so", expected="a size of 1 and up, zoom from above 0 to 1",
                         received=f"size {(out_height, out_width)}, zoom {zoom}")
    draws = tf.unstack(tf.random.stateless_uniform([6, count], seed))
    side = zoom[0] + (zoom[1] - zoom[0]) * draws[0]
    ratio = tf.exp((2 * draws[1] - 1) * math.log1p(stretch) / 2)
    part_width, part_height = tf.minimum(side * ratio, 1.0) * width, tf.minimum(side / ratio, 1.0) * height
    center_x = part_width / 2 + draws[2] * (width - part_width)
    center_y = part_height / 2 + draws[3] * (height - part_height)
    angle = (2 * draws[4] - 1) * (rotation * math.pi / 180)
    mirror = tf.where(draws[5] < 0.5, -1.0, 1.0) if flip else tf.ones(count)
    # From a place in the result to one in the image; half a pixel off, since a pixel's place is that of its middle.
    a, b = mirror * part_width / out_width * tf.cos(angle), -part_width / out_width * tf.sin(angle)
    c, d = mirror * part_height / out_height * tf.sin(angle), part_height / out_height * tf.cos(angle)
    middle_x, middle_y = (out_width - 1) / 2, (out_height - 1) / 2
    x = center_x - 0.5 - a * middle_x - b * middle_y
    y = center_y - 0.5 - c * middle_x - d * middle_y
    return _interpolated(images, tf.stack([a, b, x]), tf.stack([c, d, y]), out_height, out_width)


@_fused
def _interpolated(images: tf.Tensor, across: tf.Tensor, down: tf.Tensor, out_height: int, out_width: int) -> tf.Tensor:
    """Sample each image bilinearly at the places (across . (column, row, 1), down . (column, row, 1)), mirrored at the
    edges; both float32 (3, batch)."""
    count, height, width, channels = images.shape
    column = tf.range(out_width, dtype=tf.float32)[None, None, :]
    row = tf.range(out_height, dtype=tf.float32)[None, :, None]
    (left, right_of), (top, below) = (
        _neighbors(by_column[:, None, None] * column + by_row[:, None, None] * row + start[:, None, None], size)
        for (by_column, by_row, start), size in ((tf.unstack(across), width), (tf.unstack(down), height)))
    right, bottom = tf.minimum(left + 1, width - 1), tf.minimum(top + 1, height - 1)
    lines, pixels = tf.range(count)[:, None, None] * height, tf.reshape(images, [-1, channels])

    def at(row, column):
        return tf.cast(tf.gather(pixels, (lines + row) * width + column), tf.float32)

    upper = at(top, left) + right_of * (at(top, right) - at(top, left))
    lower = at(bottom, left) + right_of * (at(bottom, right) - at(bottom, left))
    return tf.cast(tf.round(upper + below * (lower - upper)), tf.uint8)


def _neighbors(place: tf.Tensor, size: int) -> tuple[tf.Tensor, tf.Tensor]:
    """Return the pixel before each place in [0, size - 1], int32, and the share of the one after it, (..., 1)."""
    # From edge to edge and back, the mirror is at half a pixel before the first one.
    place = tf.math.floormod(place + 0.5, 2.0 * size)
    place = tf.clip_by_value(tf.minimum(place, 2.0 * size - place) - 0.5, 0.0, size - 1.0)
    before = tf.floor(place)
    return tf.cast(before, tf.int32), (place - before)[..., None]


def shift(images: tf.Tensor, seed: tf.Tensor, *, pixels: int, flip: bool = True) -> tf.Tensor:
    """Move each image by up to so many whole pixels either way, mirrored at its edges, and flip half of them.

    One gather without any interpolation: for small images, whose training leaves microseconds for each.
    """
    count, height, width, channels = images.shape
    if not 0 <= pixels < min(height, width):
        raise UsageError("an image cannot be shifted by so many pixels", expected=f"0 to {min(height, width) - 1}",
                         received=pixels)
    moves = tf.random.stateless_uniform([2, count, 1], seed, -pixels, pixels + 1, tf.int32)
    rows = _reflected(tf.range(height)[None] + moves[0], height)
    columns = _reflected(tf.range(width)[None] + moves[1], width)
    if flip:
        mirrored = tf.random.stateless_uniform([count, 1], seed + [1, 0]) < 0.5
        columns = tf.where(mirrored, width - 1 - columns, columns)
    places = (tf.range(count)[:, None, None] * height + rows[:, :, None]) * width + columns[:, None, :]
    return tf.gather(tf.reshape(images, [-1, channels]), places)


def _reflected(places: tf.Tensor, size: int) -> tf.Tensor:
    inside = tf.abs(places)
    return tf.where(inside >= size, 2 * (size - 1) - inside, inside)


def color(images: tf.Tensor, seed: tf.Tensor, *, brightness: float = 0.0, contrast: float = 0.0,
          saturation: float = 0.0) -> tf.Tensor:
    """Change each image's brightness, contrast and saturation by factors of up to 1 + these, either way.

    Returns:
        float32 images in [0, 255].
    """
    count = images.shape[0]
    draws = 2 * tf.random.stateless_uniform([3, count, 1, 1, 1], seed + [2, 0]) - 1
    return _colored(images, *(tf.exp(draw * math.log1p(most)) for draw, most in
                              zip(tf.unstack(draws), (brightness, contrast, saturation), strict=True)))


@_fused
def _colored(images: tf.Tensor, light: tf.Tensor, spread: tf.Tensor, tint: tf.Tensor) -> tf.Tensor:
    pixels = tf.cast(images, tf.float32)
    gray = tf.reduce_mean(pixels, axis=3, keepdims=True)
    mean = tf.reduce_mean(gray, axis=(1, 2), keepdims=True)
    # All three are mixtures of pixel, its gray and the image's mean, so they are one pass over the pixels.
    return tf.clip_by_value(light * (spread * tint) * pixels + light * (spread * (1 - tint)) * gray
                            + light * (1 - spread) * mean, 0.0, 255.0)


def erase(images: tf.Tensor, seed: tf.Tensor, *, share: float) -> tf.Tensor:
    """Gray out a square of `share` of the side at a random place (cutout, arXiv 1708.04552), over the edges too."""
    count = images.shape[0]
    middles = tf.random.stateless_uniform([2, count, 1], seed + [3, 0])
    return _erased(images, middles, share)


@_fused
def _erased(images: tf.Tensor, middles: tf.Tensor, share: float) -> tf.Tensor:
    height, width = images.shape[1:3]
    rows = tf.abs((tf.range(height, dtype=tf.float32) + 0.5) / height - middles[0]) < share / 2
    columns = tf.abs((tf.range(width, dtype=tf.float32) + 0.5) / width - middles[1]) < share / 2
    inside = (rows[:, :, None] & columns[:, None, :])[..., None]
    return tf.where(inside, tf.cast(127, images.dtype), images)
