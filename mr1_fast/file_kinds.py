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


def require_file(path: Path) -> None:
    """Raise UserError for a name of something else, such as a pipe, for which a reader would wait.

    Where there is nothing of this name, it may be made.
    """
    mode = mode_of(path)
    if mode is not None and not stat.S_ISREG(mode):
        raise UserError(f"{path} is no file: move it away.")
