"""What a path names, in one look at it: two could be at different things, since others rename."""

import stat
from pathlib import Path

from .errors import UserError


def mode_of(path: Path) -> int | None:
    """Return the mode of what a path names, links followed; None if there is nothing."""
    try:
        return path.stat().st_mode
    except OSError:
        return None


def is_no_folder(path: Path) -> bool:
    """Return whether something has the name `path` that is neither a folder nor a link to one."""
    mode = mode_of(path)
    return path.is_symlink() if mode is None else not stat.S_ISDIR(mode)


def is_no_file(path: Path) -> bool:
    """Return whether something has the name `path`, such as a pipe, for which a reader would wait.

    A regular file is none, nor is a link to one.
    """
    mode = mode_of(path)
    return mode is not None and not stat.S_ISREG(mode)


def require_file(path: Path) -> None:
    """Raise UserError for a name of something else; where there is nothing, a file may be made."""
    if is_no_file(path):
        raise UserError(f"{path} is no file: move it away.")
