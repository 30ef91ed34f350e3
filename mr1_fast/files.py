"""Writing files and folders: each is written whole or not at all, also when the process is killed.

A file or folder is first written under a hidden name beside its final one, forced to the disk, and
then renamed. Whatever goes wrong becomes a UserError that names the file and the way out.
"""

import fcntl
import json
import os
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from safetensors import SafetensorError

from .errors import UserError

LOCK = ".lock"
"""The file in a folder that whoever works there holds locked."""
OPEN_FILES = ("/dev/stdout", "/dev/stderr", "/dev/fd/", "/proc/")
"""How names of files begin that a process has open."""
RESUME = "make room there, then go on with --resume"
"""The way out for files that a training run writes as it goes on."""


def write_text(path: Path, text: str, way_out: str = "choose another path") -> None:
    """Write `text` to `path` in UTF-8, on the terms of `write_bytes`."""
    write_bytes(path, text.encode(), way_out)


def write_bytes(path: Path, content: bytes, way_out: str = "choose another path") -> None:
    """Write `content` to `path`, and create the folders above it.

    A device or a pipe stays what it is, and gets the content. Raises UserError, which ends with
    `way_out`, where writing fails; a file is then as it was.
    """
    # Processes of two machines, which may share the folder, can have the same number.
    temporary = path.with_name(f".{path.name}.{uuid4().hex[:12]}.partial")
    try:
        if _is_device(path):
            _write_into(path, content)
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            temporary.write_bytes(content)
            _sync(temporary)
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_names(path.parent)
    except OSError as error:
        raise _cannot_write(path, error, way_out) from error


def _is_device(path: Path) -> bool:
    """Return whether a path is a device, a pipe or a name of an open file, such as /dev/stdout."""
    if not path.exists() or path.is_dir():
        return False
    return not path.is_file() or str(path.absolute()).startswith(OPEN_FILES)


def _write_into(path: Path, content: bytes) -> None:
    """Write to what must not be replaced; standard output goes on where it is."""
    with suppress(OSError, ValueError):  # it may be closed, or no file of the system
        if os.path.samestat(path.stat(), os.fstat(sys.stdout.fileno())):
            sys.stdout.flush()
            sys.stdout.buffer.write(content)
            sys.stdout.flush()
            return
    with path.open("wb") as file:
        file.write(content)


def write_json(path: Path, value: Any, way_out: str = "choose another with --output") -> None:
    """Write `value` to `path` as JSON in ASCII, on the terms of `write_text`."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=True), way_out)


def append_line(path: Path, record: dict, way_out: str = RESUME) -> None:
    """Append `record` to a file of JSON lines; UserError, which ends with `way_out`, if it fails.

    A process that is killed while it appends may leave a part of the line.
    """
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise _cannot_write(path, error, way_out) from error


def shorten(path: Path, size: int, way_out: str = RESUME) -> None:
    """Cut off what a file has after its first `size` bytes, if there is a file.

    Raises UserError, which ends with `way_out`, where that fails. A process that is killed
    meanwhile leaves the file as it was or as it should be.
    """
    try:
        if path.exists() and path.stat().st_size > size:
            os.truncate(path, size)
            _sync(path)
    except OSError as error:
        raise _cannot_write(path, error, way_out) from error


@contextmanager
def one_at_a_time(path: Path) -> Iterator[None]:
    """Keep other processes waiting here until the block has ended, in which `path` is made.

    The lock is a hidden file beside `path`; the system frees it if the process dies. Where the file
    system has no locks, nobody waits.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        lock = path.with_name(f".{path.name}.lock").open("a")
    except OSError as error:
        raise cannot_save(path, error) from error
    with lock:
        with suppress(OSError):
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield


@contextmanager
def exclusive(folder: Path, taken: str) -> Iterator[None]:
    """Hold the lock of `folder`, which is made, within a block; the system frees it with a process.

    Raises UserError with the sentence `taken` where another process holds it. Where the file system
    has no locks, all may go on.
    """
    path = folder / LOCK
    for _ in range(100):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            lock = path.open("a")
        except FileNotFoundError:  # another process has just removed the folder
            continue
        except OSError as error:
            raise UserError(
                f"output {folder} cannot be written ({error.strerror}): choose another."
            ) from error
        with lock:
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                raise UserError(taken) from error
            except OSError:
                pass
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


class atomic_folder:
    """Context manager that yields a temporary folder to fill, which then becomes `path`.

    If the block raises, `path` stays as it was and the temporary folder is removed; a full disk, or
    a missing permission, becomes a UserError. A folder that `path` names already is moved aside,
    the new one takes its name, and the old one is removed last. A process that is killed after
    the old folder has been moved and before the new one has its name leaves no `path`, but the old
    folder as `.NAME.replaced`: the next `atomic_folder(path)`, or `restore_folder(path)` of whoever
    reads it, brings it back.
    """

    def __init__(self, path: Path):
        self.path = path
        self.temporary = path.with_name(f".{path.name}.partial")

    def __enter__(self) -> Path:
        try:
            restore_folder(self.path)
            shutil.rmtree(self.temporary, ignore_errors=True)
            self.temporary.mkdir(parents=True)
        except OSError as error:
            raise cannot_save(self.path, error) from error
        return self.temporary

    def __exit__(self, kind, error, traceback) -> None:
        if error is None:
            try:
                self._take_the_name()
            except OSError as failure:
                error = failure
        if error is not None:
            shutil.rmtree(self.temporary, ignore_errors=True)
        if isinstance(error, OSError | SafetensorError):
            raise cannot_save(self.path, error) from error

    def _take_the_name(self) -> None:
        for path in self.temporary.rglob("*"):
            if path.is_dir():
                _sync_names(path)
            else:
                _sync(path)
        _sync_names(self.temporary)

        replaced = _replaced(self.path)
        if self.path.exists():
            self.path.rename(replaced)
        try:
            self.temporary.rename(self.path)
        except OSError:
            restore_folder(self.path)
            raise

        # The new name must be on the disk before the old content is gone from it.
        _sync_names(self.path.parent)
        shutil.rmtree(replaced, ignore_errors=True)


def restore_folder(path: Path) -> None:
    """Finish what a process that was killed in `atomic_folder(path)` had begun.

    Brings the old folder back if no new one has taken its name, and removes it otherwise.
    """
    replaced = _replaced(path)
    if not replaced.exists():
        return
    if path.exists():
        shutil.rmtree(replaced)
    else:
        replaced.rename(path)
        _sync_names(path.parent)


def _replaced(path: Path) -> Path:
    """Where `atomic_folder` keeps the old folder until the new one has its name."""
    return path.with_name(f".{path.name}.replaced")


def _sync_names(folder: Path) -> None:
    """Force the names in a folder to the disk, where its file system can do that."""
    with suppress(OSError):
        _sync(folder)


def _sync(path: Path) -> None:
    """Force the content of a file to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _cannot_write(path: Path, error: OSError, way_out: str) -> UserError:
    return UserError(f"{path} cannot be written ({error.strerror}): {way_out}.")


def cannot_save(path: Path, error: Exception) -> UserError:
    """Return what to raise where the folder `path` could not be made, of which nothing is left."""
    return UserError(
        f"{path} could not be saved ({error}): nothing of it was kept; make room or permission "
        "there, then go on from the last checkpoint with --resume."
    )
