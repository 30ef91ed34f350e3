"""Pixels of every kind as upright 8-bit RGB, and the formats of files that may hold them."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Condition, Lock
from typing import BinaryIO

import numpy as np
from PIL import Image

from .bounded_file import BoundedFile

FORMATS = ("PNG", "JPEG", "WEBP", "GIF", "BMP", "TIFF")
"""The formats that are read. Pillow knows many more: for some, such as EPS, it starts another
program, and the rest are decoders of rare formats that hostile data could choose."""
MOST_PIXELS = 89_478_485
"""The most pixels of an image, and of all images of a row together; it is Pillow's own limit. Their
decoding takes at most about 1.5 GB of memory."""
BAND = 2**20
"""Pixels of deep gray levels that are scaled at a time."""

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


class _Turns:
    """Lets threads decode at the same time only as long as their images fit into memory."""

    def __init__(self) -> None:
        self.left = MOST_PIXELS
        self.changed = Condition()

    @contextmanager
    def of(self, pixels: int) -> Iterator[None]:
        """Wait until an image of so many pixels may be decoded."""
        pixels = min(pixels, MOST_PIXELS)
        with self.changed:
            self.changed.wait_for(lambda: self.left >= pixels)
            self.left -= pixels
        try:
            yield
        finally:
            with self.changed:
                self.left += pixels
                self.changed.notify_all()


_turns = _Turns()


def open_image(file: BinaryIO) -> Image.Image:
    """Open an encoded image, of which only the header is read.

    Raises ValueError for another format, for too many pixels and for too many pieces, and whatever
    Pillow raises for a broken file.
    """
    bounded = BoundedFile(file)
    too_many = ValueError(f"it has more than {MOST_PIXELS:,} pixels")
    try:
        with _warnings, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of broken tags and EXIF data
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            image = Image.open(bounded, formats=FORMATS)
    except Image.UnidentifiedImageError as error:
        known = ", ".join(FORMATS)
        raise ValueError(f"it is not an image in one of the formats {known}") from error
    except (Image.DecompressionBombWarning, Image.DecompressionBombError) as error:
        raise too_many from error
    if image.width * image.height > MOST_PIXELS:
        raise too_many
    if image.format in ("JPEG", "MPO"):
        bounded.count_scans()
    return image


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
    with _turns.of(image.width * image.height):
        return _decoded(image)


def _decoded(image: Image.Image) -> Image.Image:
    """Return the image as upright RGB; as many pixels as it has may be decoded."""
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
    levels = np.asarray(image)
    flat = levels.reshape(-1)
    bands = [slice(start, start + BAND) for start in range(0, flat.size, BAND)]
    least, greatest = _range(flat, bands)

    # Pillow may read 16 bits of a PNG as 32-bit integers.
    if image.mode.startswith("I;16") or (image.mode == "I" and image.format == "PNG"):
        least, greatest = 0, 65535
    elif least >= 0 and greatest <= 1:
        least, greatest = 0, 1
    elif least >= 0 and greatest <= 255:
        least, greatest = 0, 255

    scaled = np.empty(flat.size, np.uint8)
    for band in bands:  # all at once, it would take 30 bytes of memory for each pixel
        part = flat[band].astype(np.float64)
        clear = part == image.info.get("transparency")
        part -= least
        part /= (greatest - least) or 1
        part = np.nan_to_num(part, nan=0, posinf=1, neginf=0).clip(0, 1)
        part[clear] = 1
        scaled[band] = (part * 255).round()
    return Image.fromarray(scaled.reshape(levels.shape))


def _range(levels: np.ndarray, bands: list[slice]) -> tuple[float, float]:
    """Return the least and the greatest of levels that are numbers; 0 and 0 where none is."""
    ends = []
    for band in bands:
        part = levels[band].astype(np.float64)
        numbers = part[np.isfinite(part)]
        ends += [numbers.min(), numbers.max()] if numbers.size else []
    return (min(ends), max(ends)) if ends else (0, 0)
