"""Images as they come: every kind to the same arrays, and what is none refused in a sentence."""

import io
import resource
import struct
import zlib

import numpy as np
import pytest
from PIL import Image

from hpcai_cli.engine.raw import images
from hpcai_cli.engine.raw.images import FORMATS, decode, read_image
from hpcai_cli.errors import DataError

COLORS = np.array([[[255, 0, 0], [0, 255, 0], [0, 0, 255]], [[0, 0, 0], [255, 255, 255], [100, 150, 200]]], np.uint8)
SHAPE = COLORS.shape
GRAY = (COLORS @ [0.299, 0.587, 0.114])[..., None]


def png(width: int, height: int, data: bytes = b"") -> bytes:
    """Return a PNG that declares a size, with any data."""
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return (b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(data)) + chunk(b"IEND", b""))


def saved(tmp_path, image: Image.Image, name: str = "image.png", **options):
    image.save(tmp_path / name, **options)
    return tmp_path / name


def blocks(colors: np.ndarray = COLORS, side: int = 16) -> Image.Image:
    """Return the picture with every pixel as a block, which JPEG leaves in peace."""
    return Image.fromarray(colors.repeat(side, 0).repeat(side, 1))


def middles(pixels: np.ndarray, side: int = 16) -> np.ndarray:
    return pixels[side // 2::side, side // 2::side].astype(int)


def test_color_and_gray(tmp_path):
    path = saved(tmp_path, Image.fromarray(COLORS))
    found = read_image(path, SHAPE)
    assert found.dtype == np.uint8
    np.testing.assert_array_equal(found, COLORS)
    np.testing.assert_allclose(read_image(str(path), (2, 3, 1)), GRAY, atol=1)
    gray = saved(tmp_path, Image.fromarray(COLORS).convert("L"))
    np.testing.assert_allclose(read_image(gray, (2, 3, 1)), GRAY, atol=1)
    np.testing.assert_allclose(read_image(gray, SHAPE), GRAY.repeat(3, 2), atol=1)


@pytest.mark.parametrize("name", ["i.png", "i.bmp", "i.tif", "i.webp", "misnamed.jpg"])
def test_lossless_formats_whatever_the_name_says(tmp_path, name):
    options = {"lossless": True} if name == "i.webp" else {"format": "BMP"} if name == "misnamed.jpg" else {}
    np.testing.assert_array_equal(read_image(saved(tmp_path, Image.fromarray(COLORS), name, **options), SHAPE), COLORS)


@pytest.mark.parametrize("mode", ["RGB", "CMYK", "L"])
def test_jpeg(tmp_path, mode):
    path = saved(tmp_path, blocks().convert(mode), "i.jpg", quality=95)
    found = middles(read_image(path, (32, 48, 3)))
    np.testing.assert_allclose(found, GRAY.repeat(3, 2) if mode == "L" else COLORS, atol=12)


def test_transparency_is_laid_on_white(tmp_path):
    pixels = np.dstack([COLORS, [[255, 0, 51], [255, 0, 255]]]).astype(np.uint8)
    found = read_image(saved(tmp_path, Image.fromarray(pixels)), SHAPE)
    share = pixels[..., 3:] / 255
    np.testing.assert_allclose(found, COLORS * share + 255 * (1 - share), atol=1)
    gray = np.dstack([GRAY, pixels[..., 3:]]).astype(np.uint8)
    found = read_image(saved(tmp_path, Image.fromarray(gray, mode=None)), (2, 3, 1))
    np.testing.assert_allclose(found, GRAY * share + 255 * (1 - share), atol=2)


@pytest.mark.parametrize("name", ["i.png", "i.gif"])
def test_a_palette_with_transparency(tmp_path, name):
    image = Image.fromarray(np.array([[0, 1, 2]], np.uint8), mode=None).convert("P")
    image.putpalette([255, 0, 0, 0, 255, 0, 0, 0, 255])
    path = saved(tmp_path, image, name, transparency=1)
    np.testing.assert_array_equal(read_image(path, (1, 3, 3)), [[[255, 0, 0], [255, 255, 255], [0, 0, 255]]])


@pytest.mark.parametrize(("top", "expected"), [(65535, [0, 127, 255]), (255, [0, 128, 255])])
def test_sixteen_bits(tmp_path, top, expected):
    pixels = np.array([[0, round(top * 0.5), top]], np.uint16)
    for name in ("i.png", "i.tif"):
        path = saved(tmp_path, Image.fromarray(pixels), name)
        np.testing.assert_allclose(read_image(path, (1, 3, 1))[..., 0], [expected], atol=1)
        assert read_image(path, (1, 3, 3)).shape == (1, 3, 3)


def test_floating_point_pixels(tmp_path):
    path = saved(tmp_path, Image.fromarray(np.array([[-5.0, 7.5, np.nan, 255.0]], np.float32)), "i.tif")
    np.testing.assert_array_equal(read_image(path, (1, 4, 1)), [[[0], [7], [0], [255]]])


@pytest.mark.parametrize("name", ["i.jpg", "i.png", "i.webp"])
@pytest.mark.parametrize(("orientation", "apply"), [
    (1, lambda array: array), (2, np.fliplr), (3, lambda array: np.rot90(array, 2)), (4, np.flipud),
    (5, lambda array: array.transpose(1, 0, 2)), (6, lambda array: np.rot90(array, -1)),
    (7, lambda array: np.rot90(array, 2).transpose(1, 0, 2)), (8, np.rot90)])
def test_the_orientation_of_the_camera_is_applied(tmp_path, name, orientation, apply):
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = apply(COLORS)
    path = saved(tmp_path, blocks(), name, exif=exif, quality=95)
    height, width, _ = upright.shape
    np.testing.assert_allclose(middles(read_image(path, (16 * height, 16 * width, 3))), upright, atol=40)


def test_of_an_animation_the_first_picture_counts(tmp_path):
    frames = [Image.fromarray(COLORS), Image.fromarray(255 - COLORS)]
    path = saved(tmp_path, frames[0], "i.gif", save_all=True, append_images=frames[1:], duration=100)
    np.testing.assert_array_equal(read_image(path, SHAPE), COLORS)


def test_another_size_is_resized(tmp_path):
    ramp = np.tile(np.arange(0, 250, 10, dtype=np.uint8), (9, 1))
    path = saved(tmp_path, Image.fromarray(ramp))
    found = read_image(path, (3, 5, 1))
    assert found.shape == (3, 5, 1)
    np.testing.assert_allclose(found[1, :, 0], [20, 70, 120, 170, 220], atol=5)
    assert read_image(path, (40, 50, 3)).shape == (40, 50, 3)
    assert read_image(path, (1, 1, 3)).shape == (1, 1, 3)


def refused(path, words: str) -> None:
    with pytest.raises(DataError, match=words) as caught:
        read_image(path, (8, 8, 3))
    assert caught.value.exit_code == 3
    assert "\n" not in str(caught.value)


def test_what_is_no_image(tmp_path):
    refused(tmp_path / "missing.png", "the file does not exist; expected an image file")
    refused(tmp_path, "cannot be read .Is a directory")
    refused("a\0b.png", "cannot be read")
    contents = {"text.png": b"<html>404</html>" * 50, "head.jpg": b"\xff\xd8\xff\xe0"}
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        refused(tmp_path / name, "not an image")
    (tmp_path / "empty.png").write_bytes(b"")
    refused(tmp_path / "empty.png", "empty file")


@pytest.mark.parametrize("name", ["i.ppm", "i.tga", "i.pcx", "i.ico", "i.jp2", "i.eps", "i.pdf", "i.psd"])
def test_other_formats_are_refused(tmp_path, name):
    """Each is one that Pillow could read or would give to another program, such as Ghostscript."""
    if name == "i.psd":
        (tmp_path / name).write_bytes(b"8BPS\0\1" + bytes(6) + struct.pack(">HIIHH", 3, 2, 2, 8, 3) + bytes(200))
    else:
        blocks().save(tmp_path / name)
    if name != "i.pdf":
        with Image.open(tmp_path / name) as image:
            assert image.format not in FORMATS
    refused(tmp_path / name, "not an image")


@pytest.mark.parametrize("name", ["i.jpg", "i.png", "i.gif", "i.bmp", "i.webp", "i.tif"])
def test_truncated_files(tmp_path, name):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    content = saved(tmp_path, Image.fromarray(noise), name).read_bytes()
    for part in (0.1, 0.5, 0.9):
        (tmp_path / name).write_bytes(content[:int(len(content) * part)])
        refused(tmp_path / name, "truncated or damaged|not an image")


def test_a_damaged_note_of_the_camera_does_not_spoil_the_picture(tmp_path):
    """A tag that is a number elsewhere holds text here, on which Pillow's ImageOps fails."""
    exif = Image.Exif()
    exif[0x0112], exif[0x010E] = 6, "text"
    content = saved(tmp_path, blocks(), "i.jpg", exif=exif).read_bytes()
    assert content.count(b"\x01\x0e\x00\x02") == 1
    (tmp_path / "i.jpg").write_bytes(content.replace(b"\x01\x0e\x00\x02", b"\x01\x01\x00\x02"))
    found = read_image(tmp_path / "i.jpg", (48, 32, 3))
    np.testing.assert_allclose(middles(found), np.rot90(COLORS, -1), atol=40)


@pytest.mark.parametrize(("width", "height", "words"), [
    (60_000, 60_000, "has more than 64,000,000 pixels"),
    (2**31 - 1, 2**31 - 1, "has more than 64,000,000 pixels"),
    (8_001, 8_000, "8001x8000 pixels are more than 64,000,000"),
    (64_000_001, 1, "64000001x1 pixels are more than"),
    (0, 5, "truncated or damaged|not an image")])
def test_a_bomb_is_refused_by_its_header(tmp_path, width, height, words):
    (tmp_path / "bomb.png").write_bytes(png(width, height, bytes(1000)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    refused(tmp_path / "bomb.png", words)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 16 << 10  # KiB


# ---- Photographs ---------------------------------------------------------------------------------------------------

def photograph(width: int = 800, height: int = 600) -> Image.Image:
    """Return a picture as smooth and as rough as photographs are: waves of all lengths, and a little noise."""
    y, x = np.mgrid[:height, :width]
    noise = np.random.default_rng(1).normal(0, 4, (height, width, 3))
    waves = sum(np.sin(x / length + number) + np.cos(y / length) for number, length in enumerate((200, 60, 17, 5)))
    return Image.fromarray(np.clip(128 + 14 * waves[..., None] * [1, 0.8, -0.6] + noise, 0, 255).astype(np.uint8))


def jpeg(image: Image.Image, **options) -> bytes:
    file = io.BytesIO()
    image.save(file, "JPEG", quality=90, **options)
    return file.getvalue()


@pytest.mark.parametrize("shape", [(150, 150, 3), (64, 64, 3), (20, 30, 1)])
def test_a_scaled_jpeg_looks_like_a_full_one(monkeypatch, shape):
    content = jpeg(photograph())
    scaled = decode(content, shape).astype(int)
    monkeypatch.setattr(images, "DRAFT_FACTOR", 10**6)
    full = decode(content, shape).astype(int)
    assert 0 < np.abs(scaled - full).mean() < 1.5


def test_scaling_minds_the_orientation():
    """Of a very wide picture that is to be turned, the scale is chosen for the turned one."""
    exif = Image.Exif()
    exif[0x0112] = 6
    upright = photograph(900, 200).transpose(Image.Transpose.ROTATE_270).resize((40, 180), Image.Resampling.BILINEAR)
    found = decode(jpeg(photograph(900, 200), exif=exif), (180, 40, 3))
    assert np.abs(found.astype(int) - np.asarray(upright, int)).mean() < 3


@pytest.mark.parametrize("share", [0.2, 0.5, 0.9, 0.99])
def test_a_truncated_jpeg_is_noticed_at_any_scale(share):
    content = jpeg(photograph())
    for side in (600, 150, 40):
        with pytest.raises(DataError, match="truncated or damaged"):
            decode(content[:int(len(content) * share)], (side, side, 3))


def test_bytes_after_the_end_are_no_harm():
    content = jpeg(photograph())
    np.testing.assert_array_equal(decode(content + b"trailing" * 99, (50, 50, 3)), decode(content, (50, 50, 3)))


def test_the_shorter_side_counts():
    content = jpeg(photograph(700, 4))
    with pytest.raises(DataError) as caught:
        decode(content, (50, 50, 3), min_size=16)
    assert str(caught.value) == "700x4 pixels is smaller than 16"
    assert decode(content, (50, 50, 3), min_size=4).shape == (50, 50, 3)


@pytest.mark.parametrize("kind", [b"VP8X", b"VP8L", b"VP8 "])
def test_a_webp_bomb_is_refused_before_its_decoder_takes_memory(kind):
    side = {b"VP8X": (16383).to_bytes(3, "little") * 2, b"VP8L": (0x0FFFFFFF).to_bytes(4, "little"),
            b"VP8 ": b"\xff\x3f\xff\x3f"}[kind]
    start = {b"VP8X": 24, b"VP8L": 21, b"VP8 ": 26}[kind]
    content = bytearray(b"RIFF" + bytes(4) + b"WEBP" + kind + bytes(100))
    content[start:start + len(side)] = side
    with pytest.raises(DataError, match="1638[34]x1638[34] pixels are more than"):
        decode(bytes(content), (8, 8, 3))


def test_a_png_whose_text_unpacks_to_a_bomb():
    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    whole = png(2, 2, b"\0ab\0cd")
    text = chunk(b"zTXt", b"key\0\0" + zlib.compress(bytes(64 << 20)))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(DataError, match="truncated or damaged"):
        decode(whole[:33] + text + whole[33:], (8, 8, 3))
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 32 << 10  # KiB
