"""What is shown to the user: the exception that is meant for it, and text that may be hostile."""

import errno
import sys
from collections.abc import Callable
from typing import TypeVar

Result = TypeVar("Result")


def printable(text: str) -> str:
    """Return a text with its control characters escaped, which a terminal would obey.

    Line breaks stay. Data and model output may hold anything.
    """
    return "".join(
        each if each.isprintable() or each == "\n" else repr(each)[1:-1] for each in text
    )


class UserError(Exception):
    """Bad input; its message is one sentence that names the field or file and the way out.

    The names of columns and files may hold anything, so what a terminal would obey is escaped.
    """

    def __init__(self, message: str):
        super().__init__(printable(message))


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
