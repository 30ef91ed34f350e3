"""Images as data has them, decoded to RGB."""

import io
from pathlib import Path
from typing import Any

from PIL import Image, ImageOps

from ...errors import UserError


def as_list(cell: Any) -> list | tuple:
    """Return the images of a cell that holds none, one or several."""
    if cell is None:
        return []
    return cell if isinstance(cell, (list, tuple)) else [cell]


def decode(cell: Any, root: Path, archive: str | None, row: str) -> Image.Image:
    """Decode an image as upright RGB, with white where it is transparent.

    `cell` is a path, encoded bytes, `{"bytes", "path"}` or a PIL image. Raises UserError, which
    names the row, for one that cannot be read.
    """
    if not isinstance(cell, dict):
        cell = {"path" if isinstance(cell, str) else "bytes": cell}
    content, name = cell.get("bytes"), f"the image in {row}"
    if content is None:
        if not isinstance(cell.get("path"), str):
            raise UserError(f"{name} is neither a path nor encoded bytes: give one of them.")
        content = _find_image(cell["path"], root, archive, row)
        name = f"image file {content} ({row})"

    try:
        content = io.BytesIO(content) if isinstance(content, bytes) else content
        image = content if isinstance(content, Image.Image) else Image.open(content)
        image.load()
    except Exception as error:  # Pillow raises many kinds of errors for broken files
        raise UserError(
            f"{name} cannot be decoded ({error}): replace it or leave its row out."
        ) from error

    image = ImageOps.exif_transpose(image)
    if image.has_transparency_data:
        image = image.convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def _find_image(path: str, root: Path, archive: str | None, row: str) -> Path:
    """Return where an image file is; raises UserError if it is missing."""
    within = Path(path)
    if within.parts[:1] == (archive,) and not (root / archive).is_dir():
        within = within.relative_to(archive)
    file = root / within
    if not file.is_file():
        raise UserError(
            f"image file {file} ({row}) is missing: put it there, or set image_root to the folder "
            f"that holds {path}."
        )
    return file
