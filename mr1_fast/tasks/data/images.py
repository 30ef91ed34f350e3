"""Images as data has them, decoded to RGB."""

import base64
import io
import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import unquote, unquote_to_bytes

import numpy as np
from PIL import Image

from ...errors import UserError, shortened
from .paths import ImageFolder, open_file
from .pixels import MOST_PIXELS, open_image, to_rgb, upright_size
from .urls import is_address, read_address

Result = TypeVar("Result")

KEYS = ("bytes", "path", "image", "url", "image_url")
"""The keys of a dictionary that may hold an image; the first that holds anything counts."""
DEEPEST = 4
"""The most dictionaries around an image."""
LONG = 500
"""The characters from which on a text that can be base64 is taken for it, if no file has that name.
"""


def as_list(cell: Any) -> list | tuple:
    """Return the images of a cell that holds none, one or several."""
    if cell is None:
        return []
    return cell if isinstance(cell, (list, tuple)) else [cell]


def image_path(cell: Any) -> str | None:
    """Return the path or address of an image; None for one that is in the data itself."""
    key, content = _unwrapped(cell)
    if isinstance(cell, dict) and isinstance(cell.get("path"), str):
        key, content = "path", cell["path"]
    if not isinstance(content, str) or key == "bytes":
        return None
    return content if len(content) <= LONG and not _is_data(content) else None


@dataclass(frozen=True)
class ImageReader:
    """Reads the images of data.

    An image is a path, a file://, data: or http(s) address, encoded bytes, base64 text, a PIL
    image, an array of gray levels or RGB, or a dictionary with one of them as `bytes`, `path`,
    `image`, `url` or `image_url`.
    """

    root: Path
    """The folder at which relative paths start."""
    fenced: bool = False
    """Whether files outside `root` are refused."""
    archive: str | None = None
    """A first folder of paths that is left out if `root` has no folder of that name."""
    allow_urls: bool = False
    """Whether http and https addresses are downloaded."""

    def read(self, cell: Any, row: str) -> Image.Image:
        """Decode an image as upright RGB, with white where it is transparent.

        Raises UserError, which names the row, for one that cannot be read.
        """
        return self._apply(to_rgb, cell, row)

    def read_all(self, cells: Sequence[Any], row: str) -> tuple[Image.Image, ...]:
        """Decode the images of a row as `read` does.

        Raises UserError, too, where they have more pixels together than two images may have.
        """
        images, left = [], 2 * MOST_PIXELS

        def decoded(image: Image.Image) -> Image.Image:
            if image.width * image.height > left:
                raise ValueError(f"the images of a row have at most {2 * MOST_PIXELS:,} pixels")
            return to_rgb(image)

        for cell in cells:
            images.append(self._apply(decoded, cell, row))
            left -= images[-1].width * images[-1].height
        return tuple(images)

    def header(self, cell: Any, row: str) -> tuple[int, int]:
        """Return the width and height of the upright image, of which only the header is read.

        Raises UserError as `read` does, except for what only decoding can find.
        """
        return self._apply(upright_size, cell, row)

    def stamp(self, cell: Any) -> tuple[str, int, int] | None:
        """Return the place of an image's file, its size, and when it was last changed.

        It is None for an image that is no file, or none that is there.
        """
        name = image_path(cell)
        path = name and self._folder.find(name)
        try:
            status = os.stat(path) if path else None
        except OSError:
            return None
        return status and (str(path), status.st_size, status.st_mtime_ns)

    @property
    def _folder(self) -> ImageFolder:
        return ImageFolder(self.root, self.fenced, self.archive)

    def _apply(self, function: Callable[[Image.Image], Result], cell: Any, row: str) -> Result:
        """Return what `function` makes of an image."""
        found, name = self._find(cell, row)
        try:
            if isinstance(found, np.ndarray):
                found = Image.fromarray(found)
            if isinstance(found, Image.Image):
                return function(found)
            with found:
                return function(open_image(found))
        except Exception as error:  # Pillow raises many kinds of errors for broken files
            reason = shortened(str(error) or type(error).__name__, 120)
            raise UserError(
                f"{name} cannot be decoded ({reason}): replace it or leave its row out."
            ) from error

    def _find(self, cell: Any, row: str) -> tuple[BinaryIO | Image.Image | np.ndarray, str]:
        """Return the image of a cell, opened but not decoded, and what messages call it."""
        name = f"the image in {row}"
        key, content = _unwrapped(cell)
        if isinstance(content, (Image.Image, np.ndarray)):
            return content, name
        if isinstance(content, (bytes, bytearray, memoryview)):
            return io.BytesIO(content), name
        if not isinstance(content, str) or not content.strip():
            raise UserError(
                f"{name} is neither a path nor encoded bytes ({_kind(cell)}): give one of them."
            )
        if _is_data(content):
            return io.BytesIO(_from_data_address(content, row)), name
        if key != "bytes" and is_address(content.lstrip()):
            return io.BytesIO(self._from_address(content.strip(), row)), name
        return self._from_text(content, key != "bytes", row)

    def _from_address(self, address: str, row: str) -> bytes:
        """Return the encoded image at an http or https address, if the user allows that."""
        if not self.allow_urls:
            raise UserError(
                f"the image in {row} is at {shortened(address)}, and nothing is downloaded "
                "without --allow-urls: add it if you trust the data, or give a file."
            )
        return read_address(address, row)

    def _from_text(self, text: str, may_be_path: bool, row: str) -> tuple[BinaryIO, str]:
        """Return the image that a text names as a path, or else holds in base64."""
        if may_be_path and (path := self._folder.find(text)):
            return open_file(path, row), f"image file {shortened(path, 160)} ({row})"

        content = _from_base64(text)
        # Nearly every short word is base64 of something, and more likely the name of a file.
        if content is not None and (not may_be_path or len(text) > LONG or _is_image(content)):
            return io.BytesIO(content), f"the image in {row}"
        if may_be_path:
            raise self._folder.error(text, row)
        raise UserError(
            f"the image in {row} has 'bytes' that are neither bytes nor base64 "
            f"({shortened(text)}): encode them, or call it 'path'."
        )


def _unwrapped(cell: Any) -> tuple[str | None, Any]:
    """Return what is inside the dictionaries around an image, and its key there."""
    key = None
    for _ in range(DEEPEST):
        if not isinstance(cell, dict):
            break
        key = next((key for key in KEYS if not _is_empty(cell.get(key))), None)
        cell = cell.get(key)
    return key, cell


def _is_empty(value: Any) -> bool:
    """Return whether there is no image in the value of a key."""
    return value is None or (isinstance(value, (str, bytes)) and not value)


def _kind(cell: Any) -> str:
    """Return in a few words what a cell is that holds no image."""
    if isinstance(cell, dict):
        return f"a dictionary with the keys {shortened(', '.join(map(str, cell)))}"
    return "an empty text" if isinstance(cell, str) else f"a value of type {type(cell).__name__}"


def _is_data(text: str) -> bool:
    """Return whether a text is a data: address."""
    return text[:20].lstrip()[:5].lower() == "data:"


def _from_data_address(text: str, row: str) -> bytes:
    """Return the bytes in a data: address."""
    kind, _, content = text.partition(",")
    if kind.rstrip().lower().endswith(";base64"):
        found = _from_base64(unquote(content))
    else:
        found = unquote_to_bytes(content.encode(errors="replace"))
    if not found:
        raise UserError(
            f"the image in {row} is a data: address without readable content "
            f"({shortened(text)}): write data:image/png;base64, and then the image in base64."
        )
    return found


def _from_base64(text: str) -> bytes | None:
    """Return the bytes that a text holds in base64; None if it is something else.

    White space, missing padding and the alphabet for addresses are allowed.
    """
    letters = "".join(text.split()).rstrip("=").replace("-", "+").replace("_", "/")
    try:
        return base64.b64decode(letters + "=" * (-len(letters) % 4), validate=True)
    except ValueError:
        return None


def _is_image(content: bytes) -> bool:
    """Return whether bytes begin as an image does."""
    try:
        open_image(io.BytesIO(content))
    except Exception:  # Pillow raises many kinds of errors for broken files
        return False
    return True
