"""Image files to the arrays that a recipe's model takes."""

import struct
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from hpcai_cli.errors import DataError

FORMATS = ("PNG", "JPEG", "BMP", "GIF", "WEBP", "TIFF")
"""Decoders that a stranger's file may reach; Pillow knows dozens more."""
MOST_PIXELS = 64_000_000
"""Checked against the header, before memory is taken."""
_DAMAGE = (ArithmeticError, EOFError, LookupError, OSError, SyntaxError, TypeError, ValueError, struct.error)
"""What Pillow's decoders and its reading of EXIF raise for damaged files."""


def read_image(path: Path | str, shape: tuple[int, int, int]) -> np.ndarray:
    """Decode an image and bring it to uint8 (height, width, channels) in [0, 255].

    The orientation that a camera noted is applied, transparency is laid on white, one channel means gray, three mean
    RGB, and another size is resized bilinearly without regard to the aspect ratio.

    Raises:
        DataError: the file is missing, no image, damaged, or larger than MOST_PIXELS.
    """
    height, width, channels = shape
    try:
        with Image.open(path, formats=FORMATS) as image:
            if image.width * image.height > MOST_PIXELS:
                raise DataError(f"the image has {image.width} x {image.height} pixels",
                                expected=f"at most {MOST_PIXELS:,}")
            picture = _flattened(ImageOps.exif_transpose(image)).convert("L" if channels == 1 else "RGB")
        if picture.size != (width, height):
            picture = picture.resize((width, height), Image.Resampling.BILINEAR)
        return np.asarray(picture, np.uint8).reshape(shape)
    except FileNotFoundError:
        raise DataError("the file does not exist", expected="an image file") from None
    except UnidentifiedImageError:
        raise DataError("this is no image", expected=f"one of {', '.join(FORMATS)}") from None
    except (*_DAMAGE, Image.DecompressionBombError) as error:
        raise DataError(f"the image cannot be decoded: {str(error).strip() or type(error).__name__}") from None


def _flattened(image: Image.Image) -> Image.Image:
    """Bring transparency, palettes and more than 8 bits to plain 8-bit pixels."""
    if image.mode.startswith("I") or image.mode == "F":
        pixels = np.nan_to_num(np.asarray(image, np.float64))
        # 16-bit files use the whole range; a 16-bit file of small numbers would else come out black or saturated.
        top = 65535.0 if pixels.max() > 255 else 255.0
        return Image.fromarray((np.clip(pixels, 0, top) * (255 / top)).astype(np.uint8))
    if image.mode == "P" or image.has_transparency_data:
        colored = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", colored.size, "white"), colored)
    return image
