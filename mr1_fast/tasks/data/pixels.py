"""Pixels of every kind as upright 8-bit RGB, and the formats of files that may hold them."""

import warnings
from threading import Lock
from typing import BinaryIO

import numpy as np
from PIL import Image

FORMATS = (
    *("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF", "PPM", "JPEG2000"),
    "AVIF",  # not in every build of Pillow
)
"""The formats that are read. All are read by Pillow itself; for others, such as EPS, it would start
another program."""

TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
"""How to turn an image upright, by its EXIF orientation; from 5 on, width and height change."""

_warnings = Lock()  # warnings.catch_warnings is not safe with several threads


def open_image(file: BinaryIO) -> Image.Image:
    """Open an encoded image, of which only the header is read.

    Raises ValueError for another format or for too many pixels, and whatever Pillow raises for a
    broken file.
    """
    Image.init()
    known = [name for name in FORMATS if name in Image.OPEN]
    try:
        with _warnings, warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            return Image.open(file, formats=known)
    except Image.UnidentifiedImageError as error:
        raise ValueError(f"it is not an image in one of the formats {', '.join(known)}") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise ValueError(f"it has more than {Image.MAX_IMAGE_PIXELS:,} pixels") from error


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Return the width and height that an image has once it is upright, without decoding it.

    An orientation that stands behind the pixels, as a PNG may have it, is not seen.
    """
    # A TIFF has its upright size from the start; it is turned while it is decoded.
    turned = image.format != "TIFF" and _orientation(image) >= 5
    return image.size[::-1] if turned else image.size


def to_rgb(image: Image.Image) -> Image.Image:
    """Decode an image as upright RGB, with white where it is transparent.

    Gray levels of more than 8 bits are scaled. Those of 16 bits have the range 0…65535. Other
    integers and fractions keep their values if all are in 0…255, are multiplied by 255 if all are
    in 0…1, and are otherwise stretched from their least to their greatest value. What is not a
    number becomes black.
    """
    image.load()
    turn = TURNS.get(_orientation(image))
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        image = _scaled(image)
    if turn is not None:
        image = image.transpose(turn)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _orientation(image: Image.Image) -> int:
    """Return the EXIF orientation of an image; 1, which is upright, where it has none."""
    try:
        # The method of PNG files would decode the pixels.
        value = Image.Image.getexif(image).get(0x0112, 1)
    except Exception:  # broken EXIF data raises many kinds of errors, and the pixels may be whole
        return 1
    return value if value in TURNS else 1


def _scaled(image: Image.Image) -> Image.Image:
    """Return an image of deep gray levels with 8 bits."""
    levels = np.asarray(image).astype(np.float64)
    numbers = levels[np.isfinite(levels)]
    least, greatest = (numbers.min(), numbers.max()) if numbers.size else (0, 0)

    # Pillow may read 16 bits of a PNG or PPM as 32-bit integers.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format in ("PNG", "PPM")):
        least, greatest = 0, 65535
    elif least >= 0 and greatest <= 1:
        least, greatest = 0, 1
    elif least >= 0 and greatest <= 255:
        least, greatest = 0, 255

    clear = levels == image.info.get("transparency")
    levels -= least
    levels /= (greatest - least) or 1
    levels = np.nan_to_num(levels, nan=0, posinf=1, neginf=0).clip(0, 1)
    levels[clear] = 1
    return Image.fromarray((levels * 255).round().astype(np.uint8))
