"""The one exception a user is meant to read."""

import errno
import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input: one sentence that names the field or file and the way out."""


def exit_on_user_error(main: Callable[[], None]) -> None:
    """Run a command's `main`; turn a UserError, or a full disk, into one line on stderr and exit status 2."""
    try:
        main()
    except OSError as error:
        if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
            raise
        print(
            f"error: {error.filename or 'the disk'} is full: make room, then go on with --resume.",
            file=sys.stderr,
        )
        sys.exit(2)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
