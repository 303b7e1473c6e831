"""Augmentations against numpy and plain resizing: what should stay stays, what changes does so as it is described."""

import numpy as np
import pytest
import tensorflow as tf

from hpcai_cli.engine import augmentation
from hpcai_cli.errors import UsageError

SEED = tf.constant([3, 8], tf.int32)
OTHER = tf.constant([3, 9], tf.int32)


def pictures(count: int = 8, height: int = 12, width: int = 16, channels: int = 3) -> np.ndarray:
    """Noise, so that any wrong pixel shows."""
    return np.random.default_rng(1).integers(0, 256, (count, height, width, channels), dtype=np.uint8)


def smooth(count: int, size: int) -> np.ndarray:
    """Pictures that a bilinear interpolation reproduces everywhere: planes of brightness."""
    rows, columns = np.mgrid[:size, :size]
    plane = (rows * 90 + columns * 150) / size
    return np.repeat(plane[None, :, :, None], count, axis=0).astype(np.uint8)


CALLS = {
    "warp": lambda images, seed: augmentation.warp(images, seed, zoom=(0.5, 1.0), stretch=0.3, rotation=20.0),
    "smaller warp": lambda images, seed: augmentation.warp(images, seed, size=(6, 9), zoom=(0.5, 0.9)),
    "shift": lambda images, seed: augmentation.shift(images, seed, pixels=3),
    "color": lambda images, seed: augmentation.color(images, seed, brightness=0.3, contrast=0.3, saturation=0.3),
    "erase": lambda images, seed: augmentation.erase(images, seed, share=0.4),
}


@pytest.mark.parametrize("name", CALLS)
def test_the_seed_decides_and_nothing_else(name):
    call, images = tf.function(CALLS[name]), tf.constant(pictures())
    first = call(images, SEED).numpy()
    np.testing.assert_array_equal(call(images, SEED), first)
    changed = (call(images, OTHER).numpy() != first).any(axis=(1, 2, 3))
    assert changed.mean() > 0.5
    # Each picture of the batch draws for itself.
    same = np.repeat(pictures(1), 8, axis=0)
    assert len({picture.tobytes() for picture in call(tf.constant(same), SEED).numpy()}) > 4


@pytest.mark.parametrize("name", CALLS)
def test_what_comes_out_are_pictures(name):
    for channels in (1, 3):
        found = CALLS[name](tf.constant(pictures(channels=channels)), SEED)
        assert found.shape == (8, *((6, 9) if name == "smaller warp" else (12, 16)), channels)
        assert found.dtype == (tf.float32 if name == "color" else tf.uint8)
        assert 0 <= found.numpy().min() <= found.numpy().max() <= 255


# ---- warp ----------------------------------------------------------------------------------------------------------

def test_a_warp_without_wishes_changes_no_pixel():
    images = pictures()
    np.testing.assert_array_equal(augmentation.warp(tf.constant(images), SEED, flip=False), images)


@pytest.mark.parametrize("size", [(16, 16), (24, 16), (40, 64)])
def test_a_warp_to_another_size_is_a_bilinear_resize(size):
    images = smooth(2, 32)
    found = augmentation.warp(tf.constant(images), SEED, size=size, flip=False).numpy().astype(float)
    plain = tf.image.resize(images, size, method="bilinear").numpy()
    np.testing.assert_allclose(found, plain, atol=0.51)


def test_a_warp_changes_no_picture_s_brightness():
    images = np.random.default_rng(0).integers(100, 156, (64, 16, 16, 1), dtype=np.uint8)
    found = augmentation.warp(tf.constant(images), SEED, zoom=(0.6, 1.0), rotation=30.0).numpy()
    assert images.mean() - 0.3 < found.mean() < images.mean() + 0.3


def test_about_half_of_the_images_are_mirrored_and_the_others_are_not():
    images = pictures(400, 5, 6, 1)
    found = augmentation.warp(tf.constant(images), SEED).numpy()
    stays = (found == images).all(axis=(1, 2, 3))
    mirrored = (found == images[:, :, ::-1]).all(axis=(1, 2, 3))
    assert (stays ^ mirrored).all()
    assert 150 < mirrored.sum() < 250


def test_zooming_cuts_a_part_of_the_wished_size_out():
    """On a plane of brightness, the slope of the result is the share of the side that was cut out."""
    columns = np.mgrid[:64, :64][1]
    images = np.repeat((columns * 3.0)[None, :, :, None], 200, axis=0).astype(np.uint8)
    found = augmentation.warp(tf.constant(images), SEED, flip=False, zoom=(0.5, 0.8)).numpy().astype(float)[..., 0]
    shares = (found[:, 32, 63] - found[:, 32, 0]) / (63 * 3)
    assert 0.49 < shares.min() < 0.53
    assert 0.77 < shares.max() < 0.81
    first = found[:, 32, 0] / 3
    last = found[:, 32, 63] / 3
    # Nowhere beyond the edge, and the places differ.
    assert first.min() >= 0 and last.max() <= 63
    assert first.std() > 4


def test_stretching_changes_the_aspect_ratio_by_so_much_at_most():
    rows, columns = np.mgrid[:64, :64]
    images = np.repeat((np.stack([columns, rows], axis=-1) * 3.0)[None], 200, axis=0).astype(np.uint8)
    found = augmentation.warp(tf.constant(images), SEED, flip=False, zoom=(0.7, 0.7), stretch=0.3).numpy().astype(float)
    width = found[:, 32, 63, 0] - found[:, 32, 0, 0]
    height = found[:, 63, 32, 1] - found[:, 0, 32, 1]
    ratios = width / height
    assert 1.2 < ratios.max() < 1.33
    assert 1.2 < 1 / ratios.min() < 1.33


def test_rotation_turns_by_so_much_at_most_and_either_way():
    """The direction of a plane's slope is the angle that the picture was turned by."""
    size = 65
    columns = np.mgrid[:size, :size][1]
    images = np.repeat((columns * 3.0)[None, :, :, None], 300, axis=0).astype(np.uint8)
    found = augmentation.warp(tf.constant(images), SEED, flip=False, rotation=20.0).numpy().astype(float)[..., 0]
    across = found[:, 32, 48] - found[:, 32, 16]
    down = found[:, 48, 32] - found[:, 16, 32]
    angles = np.degrees(np.arctan2(down, across))
    assert 18 < angles.max() < 21
    assert -21 < angles.min() < -18
    np.testing.assert_allclose(np.hypot(across, down), 32 * 3, atol=3)


# ---- shift ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("pixels", [1, 3, 11])
def test_a_shift_is_a_cut_out_of_the_reflected_image(pixels, flip):
    images = pictures(60)
    found = augmentation.shift(tf.constant(images), SEED, pixels=pixels, flip=flip).numpy()
    height, width = images.shape[1:3]
    seen, mirrored = set(), 0
    for before, after in zip(images, found, strict=True):
        padded = np.pad(before, ((pixels, pixels), (pixels, pixels), (0, 0)), mode="reflect")
        places = [(row, column, turn) for row in range(2 * pixels + 1) for column in range(2 * pixels + 1)
                  for turn in ((1, -1) if flip else (1,))
                  if np.array_equal(padded[row:row + height, column:column + width][:, ::turn], after)]
        assert places
        seen |= {(row, column) for row, column, _ in places[:1]}
        mirrored += places[0][2] == -1
    # All moves from -pixels to pixels come, 9 of them in the smallest case.
    assert len(seen) >= min(9, (2 * pixels + 1) ** 2)
    assert 15 < mirrored < 45 if flip else mirrored == 0


def test_no_shift_changes_no_pixel():
    images = pictures()
    np.testing.assert_array_equal(augmentation.shift(tf.constant(images), SEED, pixels=0, flip=False), images)


# ---- color ---------------------------------------------------------------------------------------------------------

def test_color_without_strength_changes_no_pixel():
    images = pictures()
    np.testing.assert_allclose(augmentation.color(tf.constant(images), SEED), images, atol=1e-3)


def test_brightness_is_a_factor_for_the_whole_picture():
    images = np.random.default_rng(0).integers(20, 100, (200, 6, 6, 3), dtype=np.uint8)
    found = augmentation.color(tf.constant(images), SEED, brightness=0.5).numpy()
    factors = found / images
    np.testing.assert_allclose(factors.std(axis=(1, 2, 3)), 0, atol=1e-5)
    factors = factors.mean(axis=(1, 2, 3))
    assert 1.45 < factors.max() <= 1.5 + 1e-5
    assert 1 / 1.5 - 1e-5 <= factors.min() < 1 / 1.45
    assert 0.4 < (factors > 1).mean() < 0.6


def test_contrast_keeps_the_mean_and_saturation_the_gray():
    images = np.random.default_rng(0).integers(100, 150, (100, 6, 6, 3), dtype=np.uint8)
    contrast = augmentation.color(tf.constant(images), SEED, contrast=0.4).numpy()
    np.testing.assert_allclose(contrast.mean(axis=(1, 2, 3)), images.mean(axis=(1, 2, 3)), rtol=1e-4)
    spreads = contrast.std(axis=(1, 2, 3)) / images.std(axis=(1, 2, 3))
    assert spreads.max() > 1.3 and spreads.min() < 1 / 1.3
    saturation = augmentation.color(tf.constant(images), SEED, saturation=0.4).numpy()
    np.testing.assert_allclose(saturation.mean(axis=3), images.mean(axis=3), rtol=1e-4)
    assert (np.abs(saturation - images).max(axis=(1, 2, 3)) > 1).mean() > 0.7


# ---- erase ---------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("share", [0.2, 0.5, 1.0])
def test_the_expected_share_is_gray_and_all_else_stays(share):
    images = np.full((500, 20, 20, 3), 7, np.uint8)
    found = augmentation.erase(tf.constant(images), SEED, share=share).numpy()
    assert set(np.unique(found)) <= {7, 127}
    gray = (found == 127).all(axis=3)
    np.testing.assert_array_equal(gray, (found == 127).any(axis=3))
    # The square's middle is anywhere, so that a side of it reaches over the edge with probability share / 2.
    assert gray.mean() == pytest.approx((share - share**2 / 4) ** 2, rel=0.1)
    assert gray.sum(axis=(1, 2)).max() <= (share * 20 + 1) ** 2
    assert (gray.any(axis=2).sum(axis=1) * gray.any(axis=1).sum(axis=1) == gray.sum(axis=(1, 2))).all()


def test_erasing_takes_what_color_gives():
    images = augmentation.color(tf.constant(pictures()), SEED, brightness=0.2)
    found = augmentation.erase(images, SEED, share=0.5)
    assert found.dtype == tf.float32
    assert (found.numpy() == 127).mean() > 0.05


# ---- What cannot be ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("call", [
    lambda images: augmentation.shift(images, SEED, pixels=12),
    lambda images: augmentation.shift(images, SEED, pixels=-1),
    lambda images: augmentation.warp(images, SEED, size=(0, 5)),
    lambda images: augmentation.warp(images, SEED, zoom=(0.0, 1.0)),
    lambda images: augmentation.warp(images, SEED, zoom=(0.5, 1.5)),
    lambda images: augmentation.warp(images, SEED, zoom=(0.9, 0.5))])
def test_what_cannot_be_is_refused(call):
    with pytest.raises(UsageError, match="an image cannot be .*; expected .*; received: "):
        call(tf.constant(pictures()))
