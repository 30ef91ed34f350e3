"""Locks between processes, which end with the process that holds them.

`locked` is on a folder or file itself and leaves nothing behind: for the moments in which names
change, and for what is temporary. `exclusive` lets one process work in a folder, and tells the
others; `one_at_a_time` lets them wait, and `if_free` lets them do something else. These last long,
so that theirs are files beside what is made.

A forked child has its parent's open files, and with them the locks, which it would keep when the
parent dies: a pool of a reward's processes outlives a run that is killed. So children let go.
"""

import fcntl
import os
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from .errors import UserError
from .file_kinds import require_file

LOCK = ".lock"
"""The file in a folder that whoever works there holds locked."""

_locked: set[int] = set()
"""The descriptors that this process has its locks on."""


@contextmanager
def _of_this_process(descriptor: int) -> Iterator[None]:
    """Keep forked children from having a lock on an open file, or getting one, within a block."""
    _locked.add(descriptor)
    try:
        yield
    finally:
        _locked.discard(descriptor)


def _let_go() -> None:
    """Drop a forked child's copies; whatever closes their descriptors still may."""
    if _locked:
        nothing = os.open(os.devnull, os.O_RDONLY)
        for descriptor in _locked:
            os.dup2(nothing, descriptor, inheritable=False)
        os.close(nothing)
        _locked.clear()


os.register_at_fork(after_in_child=_let_go)


@contextmanager
def locked(path: Path, seconds: float | None = None, must: bool = False) -> Iterator[None]:
    """Hold the lock of a folder or file within a block; the system frees it with the process.

    seconds: how long to wait for another process, after which the block runs without the lock;
        None for no limit. `must`: OSError instead, also where the file system has no locks.
    """
    descriptor = os.open(path, os.O_RDONLY)
    try:
        with _of_this_process(descriptor):
            try:
                _lock(descriptor, seconds)
            except OSError:
                if must:
                    raise
            yield
    finally:
        os.close(descriptor)


@contextmanager
def held(file: IO) -> Iterator[None]:
    """Hold the lock of an open file within a block, however long it takes to get it.

    Where the file system has no locks, nobody waits.
    """
    with _of_this_process(file.fileno()):
        with suppress(OSError):
            fcntl.flock(file, fcntl.LOCK_EX)
        yield


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


@contextmanager
def one_at_a_time(path: Path, way_out: str) -> Iterator[None]:
    """Keep other processes waiting here until the block has ended, in which `path` is made.

    The lock is a hidden file beside `path`; the system frees it if the process dies. Where the file
    system has no locks, nobody waits. Raises UserError, which ends with `way_out`, where the file
    cannot be made.
    """
    with _lock_beside(path, way_out) as lock, held(lock):
        yield


@contextmanager
def if_free(path: Path, way_out: str) -> Iterator[bool]:
    """Hold the lock of `one_at_a_time(path)` within a block, unless another process has it.

    Yields whether the block may work on `path`. Where the file system has no locks, all may.
    """
    with _lock_beside(path, way_out) as lock, _of_this_process(lock.fileno()):
        yield _get(lock) is not False


def has_locks(path: Path, way_out: str) -> bool:
    """Return whether the file system has locks, by a look at that of `one_at_a_time(path)`."""
    with _lock_beside(path, way_out) as lock, _of_this_process(lock.fileno()):
        return _get(lock) is not None


def _get(lock: IO) -> bool | None:
    """Lock an open file; False if another process has it, None if the file system has no locks."""
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError:
        return None
    return True


def _lock_beside(path: Path, way_out: str) -> IO:
    """Open the hidden file beside `path` whose lock is that of `path`."""
    name = path.with_name(f".{path.name}.lock")
    require_file(name)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return name.open("a")
    except OSError as error:
        raise UserError(f"{path} could not be saved ({error}): {way_out}.") from error


@contextmanager
def exclusive(folder: Path, taken: str) -> Iterator[None]:
    """Hold the lock of `folder`, which is made, within a block; the system frees it with a process.

    Raises UserError with the sentence `taken` where another process holds it. Where the file system
    has no locks, all may go on.
    """
    path = folder / LOCK
    require_file(path)
    for _ in range(100):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = path.open("a")
        except FileNotFoundError:  # another process has just removed the folder
            continue
        except OSError as error:
            raise UserError(
                f"output {folder} cannot be written ({error.strerror}): make room or permission "
                "there, or choose another."
            ) from error
        with lock, _of_this_process(lock.fileno()):
            if _get(lock) is False:
                raise UserError(taken)
            if not _names(path, lock):  # it was that of a process which has just ended
                continue
            try:
                yield
            finally:
                with suppress(OSError):  # as long as it is held
                    path.unlink()
            return
    raise UserError(taken)


def _names(path: Path, file: IO) -> bool:
    """Return whether a path still names an open file."""
    with suppress(OSError):
        return os.path.samestat(path.stat(), os.fstat(file.fileno()))
    return False
