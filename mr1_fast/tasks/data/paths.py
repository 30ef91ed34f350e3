"""Image files that data names: where they are, and opening them without harm."""

import os
import stat
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO
from urllib.parse import unquote

from ...errors import UserError, shortened

LARGEST_FILE = 2**29
"""The most bytes of an image file; Pillow reads files of some formats as a whole."""
LONGEST_PATH = 4096
LONGEST_NAME = 255
"""The bytes that Linux allows in a path and in each of its names."""


@dataclass(frozen=True)
class ImageFolder:
    """A folder at which relative paths of images start."""

    root: Path
    fenced: bool = False
    """Whether files outside the folder are refused, with `..` and symbolic links resolved."""
    archive: str | None = None
    """A first folder of paths that is left out if `root` has no folder of that name."""

    def find(self, text: str) -> Path | None:
        """Return where the image file is that `text` names; None if there is none.

        `text` is a path or a file:// address. If it has Windows separators, and no file has that
        literal name, they are taken for `/`.
        """
        allowed = (path for path in self._places(text) if not self._refuses(path))
        return next((path for path in allowed if os.path.exists(path)), None)

    def error(self, text: str, row: str) -> UserError:
        """Return the error for a text for which `find` has found nothing."""
        places, short = list(self._places(text)), shortened(text)
        if not places:
            return UserError(
                f"the image in {row} is neither the path of a file nor base64 ({short}): give one "
                "of them."
            )
        if any(map(self._refuses, places)):
            return UserError(
                f"image file {short} ({row}) is outside {self.root}, the folder of --image-root, "
                "which no path may leave: put it there, or set --image-root to a folder above it."
            )
        file = shortened(places[0], len(str(self.root)) + 80)
        return UserError(
            f"image file {file} ({row}) is missing: put it there, or set image_root to the folder "
            f"that holds {short}."
        )

    def _refuses(self, path: Path) -> bool:
        """Return whether the fence keeps a path out."""
        if not self.fenced:
            return False
        return not Path(os.path.realpath(path)).is_relative_to(os.path.realpath(self.root))

    def _places(self, text: str) -> Iterator[Path]:
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
            if within.parts[:1] == (self.archive,) and not (self.root / self.archive).is_dir():
                within = within.relative_to(self.archive)
            yield self.root / within


def open_file(path: Path, row: str) -> BinaryIO:
    """Open a regular file; raises UserError for anything else, such as a device or a pipe.

    A pipe without a writer would be waited for, and a device may never end.
    """
    name = f"image file {shortened(path, 160)} ({row})"
    try:
        status = os.stat(path)
        if not stat.S_ISREG(status.st_mode):
            raise UserError(f"{name} is not a regular file: give the path of an image file.")
        if status.st_size > LARGEST_FILE:
            raise UserError(f"{name} has more than {LARGEST_FILE // 2**20} MiB: make it smaller.")
        # Some regular files, of the kernel, would be waited for as well.
        return open(path, "rb", opener=lambda *args: os.open(args[0], args[1] | os.O_NONBLOCK))
    except OSError as error:
        raise UserError(
            f"{name} cannot be opened ({error.strerror}): check its permissions, and that it is "
            "still there."
        ) from error


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
