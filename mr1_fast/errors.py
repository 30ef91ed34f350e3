"""The exception that is meant for the user, and how a command ends with it."""

import errno
import sys
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


class UserError(Exception):
    """Bad input; its message is one sentence that names the field or file and the way out."""


def exit_on_user_error(main: Callable[[], Result]) -> Result:
    """Return what `main` returns, or exit with status 2 and one line on stderr if it fails.

    That is for a UserError or a full disk; any other error is raised.
    """
    try:
        return main()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        full = error.filename or "the disk"
        print(f"error: {full} is full: make room, then go on with --resume.", file=sys.stderr)
        sys.exit(2)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
