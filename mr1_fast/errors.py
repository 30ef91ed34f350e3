"""The one exception a user is meant to read."""

import sys
from collections.abc import Callable


class UserError(Exception):
    """Bad input: one sentence that names the field or file and the way out."""


def exit_on_user_error(main: Callable[[], None]) -> None:
    """Run a command's `main`; turn a UserError into one line on stderr and exit status 2."""
    try:
        main()
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
