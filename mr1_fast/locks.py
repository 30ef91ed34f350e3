"""Locks on folders themselves, which leave no file behind; they end with the process."""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def locked(folder: Path, seconds: float | None = None, must: bool = False) -> Iterator[None]:
    """Hold the lock of a folder itself within a block; the system frees it with the process.

    seconds: how long to wait for another process, after which the block runs without the lock;
        None for no limit. `must`: OSError instead, also where the file system has no locks.
    """
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        try:
            _lock(descriptor, seconds)
        except OSError:
            if must:
                raise
        yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, seconds: float | None) -> None:
    """Lock an open folder; BlockingIOError if another process has it for longer than `seconds`."""
    if seconds is None:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        return
    end = time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if time.monotonic() >= end:
                raise
        time.sleep(0.01)
