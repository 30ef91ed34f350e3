"""Writing files and folders: each is written whole or not at all, also when the process is killed.

A file or folder is first written under a hidden name beside its final one, forced to the disk, and
then renamed. Whatever goes wrong becomes a UserError that names the file and the way out.
"""

import json
import os
import re
import shutil
import stat
import sys
import threading
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from errno import ENOTDIR
from pathlib import Path
from typing import IO, Any
from uuid import uuid4

from safetensors import SafetensorError

from .errors import UserError
from .file_kinds import is_no_folder, mode_of
from .locks import held, locked

OPEN_FILES = ("/dev/stdout", "/dev/stderr", "/dev/fd/", "/proc/")
"""How names of files begin that a process has open."""
RESUME = "make room there, then go on with --resume"
"""The way out for files that a training run writes as it goes on."""
GO_ON = "make room or permission there, then go on from the last checkpoint with --resume"
"""The way out for folders that a training run makes."""
SWAP_SECONDS = 10.0
"""How long one process waits for another that gives a folder its name, which takes no time."""


def write_text(path: Path, text: str, way_out: str = "choose another path") -> None:
    """Write `text` to `path` in UTF-8, on the terms of `write_bytes`."""
    write_bytes(path, text.encode(), way_out)


def write_bytes(path: Path, content: bytes, way_out: str = "choose another path") -> None:
    """Write `content` to `path`, and create the folders above it.

    A device or a pipe stays what it is, and gets the content. What a killed process had half
    written is removed. Raises UserError, which ends with `way_out`, where writing fails; a file is
    then as it was.
    """
    try:
        if _is_device(path):
            _write_into(path, content)
            return
        _make_parents(path)
        sweep(path.parent, path.name)
        with _temporary_file(path) as file:
            file.write(content)
            file.flush()
            _sync(Path(file.name))
            os.replace(file.name, path)
        _sync_names(path.parent)
    except OSError as error:
        raise _cannot_write(path, error, way_out) from error


@contextmanager
def _temporary_file(path: Path) -> Iterator[IO[bytes]]:
    """Have a new file of a hidden name beside `path`, locked, of which the block may leave none."""
    while True:
        temporary = _unique(path)
        try:
            with temporary.open("xb") as file, held(file):
                if temporary.exists():  # no other process has just swept it away
                    yield file
                    return
        finally:
            temporary.unlink(missing_ok=True)


def _is_device(path: Path) -> bool:
    """Return whether a path is a device, a pipe or a name of an open file, such as /dev/stdout."""
    mode = mode_of(path)
    if mode is None or stat.S_ISDIR(mode):
        return False
    return not stat.S_ISREG(mode) or str(path.absolute()).startswith(OPEN_FILES)


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


class atomic_folder:
    """Context manager that yields a temporary folder to fill, which then becomes `path`.

    If the block raises, `path` stays as it was and the temporary folder is removed; a full disk, or
    a missing permission, becomes a UserError, which ends with `way_out`. Any number of processes
    may fill the same `path`: each has a temporary folder of its own, and the last to end wins, or
    with `first_wins` the first.

    A folder that `path` names already is moved aside, the new one takes its name, and the old one
    is removed last. A process that is killed between the two leaves no `path`, but the old folder
    as `.NAME.replaced`: the next `atomic_folder(path)`, or `restore_folder(path)` of whoever reads
    it, brings it back. What killed processes had half filled is removed by the next one.
    """

    def __init__(self, path: Path, way_out: str = GO_ON, first_wins: bool = False):
        self.path, self.way_out, self.first_wins = path, way_out, first_wins
        self.temporary = _unique(path)
        self._lock = ExitStack()

    def __enter__(self) -> Path:
        try:
            if is_no_folder(self.path):
                raise NotADirectoryError(ENOTDIR, "there is something else of this name")
            restore_folder(self.path)
            sweep(self.path.parent, self.path.name)
            _make_parents(self.path)
            while not self._make_temporary():
                self.temporary = _unique(self.path)
        except OSError as error:
            raise cannot_save(self.path, error, self.way_out) from error
        return self.temporary

    def _make_temporary(self) -> bool:
        """Make the temporary folder, locked; False if another process has just swept it away."""
        self.temporary.mkdir()
        try:
            self._lock.enter_context(locked(self.temporary))
        except FileNotFoundError:
            return False
        return self.temporary.exists()

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        with self._lock:
            try:
                if error is None:
                    self._force_to_disk()
                    self._take_the_name()
            except OSError as failure:
                error = failure
            finally:
                remove_folder(self.temporary)
        if isinstance(error, OSError | SafetensorError):
            raise cannot_save(self.path, error, self.way_out) from error

    def _force_to_disk(self) -> None:
        # Some libraries make files that their owner alone can read. The folder obeys the umask.
        mode = self.temporary.stat().st_mode & 0o666
        for path in self.temporary.rglob("*"):
            if path.is_dir():
                _sync_names(path)
                continue
            with suppress(OSError):  # some file systems have no modes
                path.chmod(mode)
            _sync(path)
        _sync_names(self.temporary)

    def _take_the_name(self) -> None:
        replaced, old = _replaced(self.path), _unique(self.path)
        with locked(self.path.parent, SWAP_SECONDS):
            _restore(self.path)
            _sync_names(self.path.parent)
            if self.path.exists():
                if self.first_wins:
                    return
                self.path.rename(replaced)
            try:
                self.temporary.rename(self.path)
            except BaseException:
                _restore(self.path)
                raise

            # The new name must be on the disk before the old content is gone from it.
            _sync_names(self.path.parent)
            if os.path.lexists(replaced):
                replaced.rename(old)
        remove_folder(old)


def restore_folder(path: Path) -> None:
    """Finish what a process that was killed in `atomic_folder(path)` had begun.

    Brings the old folder back if no new one has taken its name, and removes it otherwise. Nothing
    is done to what a process that is alive has moved aside.
    """
    if path.name and os.path.lexists(_replaced(path)):  # "." and "/" have no name
        with locked(path.parent, SWAP_SECONDS):
            _restore(path)


def _restore(path: Path) -> None:
    replaced = _replaced(path)
    if not os.path.lexists(replaced):
        return
    if path.exists():
        replaced.rename(old := _unique(path))
        remove_folder(old)
    else:
        replaced.rename(path)
        _sync_names(path.parent)


def discard_folder(path: Path) -> None:
    """Remove a folder, which loses its name first: a half removed one is never taken for a whole.

    One that cannot be removed stays.
    """
    old = _unique(path)
    with suppress(OSError):
        path.rename(old)
        remove_folder(old)


def sweep(folder: Path, name: str | None = None) -> None:
    """Remove what killed processes have left of `folder / name`, or of everything in `folder`.

    A temporary file or folder stays while the process that fills it is alive, and also where the
    file system has no locks by which to tell.
    """
    left = re.compile(
        r"\.%s(\.[0-9a-f]{12})?\.partial" % (".+" if name is None else re.escape(name))
    )
    try:
        found = [(path, left.fullmatch(path.name)) for path in folder.iterdir()]
    except OSError:
        return
    for path, match in found:
        if not match or path.is_symlink():
            continue
        # Earlier versions gave folders alone such names, without what makes them unique.
        if not (path.is_dir() or (match[1] and path.is_file())):
            continue
        with suppress(OSError), locked(path, seconds=0, must=True):
            remove_folder(path) if path.is_dir() else path.unlink()


def _replaced(path: Path) -> Path:
    """Where `atomic_folder` keeps the old folder until the new one has its name."""
    return path.with_name(f".{path.name}.replaced")


def _unique(path: Path) -> Path:
    """Return a hidden name beside `path` that no other process has, also on other machines."""
    return path.with_name(f".{path.name}.{uuid4().hex[:12]}.partial")


def remove_folder(path: Path) -> None:
    """Remove a folder, or a link to one, as far as that is possible.

    A thread does it, which no signal interrupts: one that is raised while shutil.rmtree closes a
    folder makes it close that twice, and comes out as another error, or not at all.
    """
    if path.is_symlink():
        path.unlink(missing_ok=True)
        return

    def remove() -> None:
        with suppress(OSError):  # rmtree raises what the system says as it closes a folder
            shutil.rmtree(path, ignore_errors=True)

    work = threading.Thread(target=remove)
    work.start()
    work.join()


def _make_parents(path: Path) -> None:
    """Make the folders above `path`, and force their names to the disk."""
    missing = [folder for folder in path.parents if not folder.exists()]
    path.parent.mkdir(parents=True, exist_ok=True)
    for folder in missing:
        _sync_names(folder.parent)


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


def cannot_save(path: Path, error: Exception, way_out: str = GO_ON) -> UserError:
    """Return what to raise where the folder `path` could not be made, of which nothing is left."""
    return UserError(f"{path} could not be saved ({error}): nothing of it was kept; {way_out}.")
