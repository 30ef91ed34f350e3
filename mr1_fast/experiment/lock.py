"""A lock that keeps two processes from running the same experiment."""

import fcntl
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import UserError


@contextmanager
def locked(output: Path) -> Iterator[None]:
    """Create the folder `output` and hold its lock, which the system frees if the process dies.

    Raises UserError where another process holds the lock, or where the folder cannot be written.
    """
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = (output / ".lock").open("a")
    except OSError as error:
        raise UserError(
            f"output {output} cannot be written ({error.strerror}): choose another."
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"another process runs the experiment in {output}: wait for it, or end it."
            ) from error
        yield
