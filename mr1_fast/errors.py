"""The one exception a user is meant to read."""

import errno
import sys
from collections.abc import Callable
from typing import TypeVar


class UserError(Exception):
    """Bad input: one sentence that names the field or file and the way out."""


Result = TypeVar("Result")


def exit_on_user_error(main: Callable[[], Result]) -> Result:
    """Return `main()`; a UserError or a full disk becomes one line on stderr and exit status 2."""
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
