"""Image files that data names: where they are, and opening them without harm."""

import os
import stat
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote

from ...errors import UserError

LONGEST_PATH = 4096
LONGEST_NAME = 255
"""The bytes that Linux allows in a path and in each of its names."""


def shortened(text: object, length: int = 80) -> str:
    """Return the start of a text for a message, without control characters."""
    text = str(text)
    text = text if len(text) <= length else f"{text[: length - 1]}…"
    return "".join(
        letter if letter.isprintable() else letter.encode("unicode_escape").decode()
        for letter in text
    )


def find_file(text: str, root: Path, fenced: bool, archive: str | None) -> Path | None:
    """Return where the image file is that `text` names; None if there is none.

    `text` is a path or a file:// address. If it has Windows separators, and no file has that
    literal name, they are taken for `/`. A relative path starts at `root`. If `fenced`, only what
    is below `root` counts, with `..` and symbolic links resolved.
    """
    for path in _places(text, root, archive):
        if os.path.exists(path) and not (fenced and leaves(path, root)):
            return path
    return None


def find_nothing(text: str, root: Path, fenced: bool, archive: str | None, row: str) -> UserError:
    """Return the error for a path for which `find_file` has found nothing."""
    places = list(_places(text, root, archive))
    if not places:
        return UserError(f"the image in {row} has no path that is possible ({shortened(text)}).")
    if fenced and any(leaves(place, root) for place in places):
        return UserError(
            f"image file {shortened(text)} ({row}) is outside {root}, the folder of --image-root, "
            "which no path may leave: put it there, or set --image-root to a folder above it."
        )
    file = shortened(places[0], len(str(root)) + 80)
    return UserError(
        f"image file {file} ({row}) is missing: put it there, or set image_root to the folder "
        f"that holds {shortened(text)}."
    )


def leaves(path: Path, root: Path) -> bool:
    """Return whether `path` is outside `root`, with symbolic links and `..` resolved."""
    return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(root))


def open_file(path: Path, row: str) -> BinaryIO:
    """Open a regular file; raises UserError for anything else, such as a device or a pipe.

    A pipe without a writer would be waited for, and a device may never end.
    """
    name = f"image file {shortened(path, 160)} ({row})"
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise UserError(f"{name} is not a regular file: give the path of an image file.")
        return open(path, "rb", opener=lambda *args: os.open(args[0], args[1] | os.O_NONBLOCK))
    except OSError as error:
        raise UserError(f"{name} cannot be opened ({error.strerror}): correct that.") from error


def _places(text: str, root: Path, archive: str | None) -> Iterator[Path]:
    """Yield the paths that `text` may mean, the most literal first."""
    names = [text]
    if text[:5].lower() == "file:":
        rest = text[5:].removeprefix("//")
        rest = rest.removeprefix("localhost") if rest.startswith("localhost/") else rest
        names = [unquote(rest), rest]
    for name in dict.fromkeys([*names, *(name.replace("\\", "/") for name in names)]):
        if not _is_possible(name):
            continue
        within = Path(os.path.expanduser(name))
        if within.parts[:1] == (archive,) and not (root / archive).is_dir():
            within = within.relative_to(archive)
        yield root / within


def _is_possible(name: str) -> bool:
    """Return whether a file can have this path."""
    try:
        encoded = os.fsencode(name)
    except ValueError:  # half of a surrogate pair
        return False
    return (
        0 < len(encoded) <= LONGEST_PATH
        and b"\0" not in encoded
        and all(len(part) <= LONGEST_NAME for part in encoded.split(b"/"))
    )
