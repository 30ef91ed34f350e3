"""Locks on folders and files themselves, which leave nothing behind; they end with the process.

A forked child has its parent's open files, and with them the locks, which it would keep when the
parent dies: a pool of a reward's processes outlives a run that is killed. So children let go.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

_held: set[int] = set()
"""The descriptors that this process has its locks on."""


@contextmanager
def of_this_process(descriptor: int) -> Iterator[None]:
    """Keep forked children from having a lock on an open file, or getting one, within a block."""
    _held.add(descriptor)
    try:
        yield
    finally:
        _held.discard(descriptor)


def _let_go() -> None:
    """Drop a forked child's copies; whatever closes their descriptors still may."""
    if _held:
        nothing = os.open(os.devnull, os.O_RDONLY)
        for descriptor in _held:
            os.dup2(nothing, descriptor, inheritable=False)
        os.close(nothing)
        _held.clear()


os.register_at_fork(after_in_child=_let_go)


@contextmanager
def locked(path: Path, seconds: float | None = None, must: bool = False) -> Iterator[None]:
    """Hold the lock of a folder or file within a block; the system frees it with the process.

    seconds: how long to wait for another process, after which the block runs without the lock;
        None for no limit. `must`: OSError instead, also where the file system has no locks.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with of_this_process(descriptor):
            try:
                _lock(descriptor, seconds)
            except OSError:
                if must:
                    raise
            yield
    finally:
        os.close(descriptor)


def _lock(descriptor: int, seconds: float | None) -> None:
    """Lock what is open; BlockingIOError if another process has it for longer than `seconds`."""
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
