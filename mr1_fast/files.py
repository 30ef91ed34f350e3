"""Writing files and folders all or nothing."""

import json
import os
import shutil
from contextlib import suppress
from pathlib import Path

from safetensors import SafetensorError

from .errors import UserError


def write_atomically(path: Path, text: str) -> None:
    """Write the whole text to `path` in UTF-8, or leave `path` as it was and raise OSError."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        temporary.write_text(text, encoding="utf-8")
        os.replace(temporary, path)
    except OSError:
        with suppress(OSError):
            temporary.unlink()
        raise


def write_json(path: Path, value: dict) -> None:
    """Write all of the JSON file or nothing; UserError where it cannot be written."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(path, json.dumps(value, indent=1, ensure_ascii=True))
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): choose another with --output."
        ) from error


def append_line(path: Path, record: dict) -> None:
    """Append a line to a file of JSON lines; UserError where that cannot be done."""
    try:
        with path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): make room there, then go on with --resume."
        ) from error


def keep_lines_before(path: Path, step: int) -> None:
    """Drop the lines of `step` and later from a file of JSON lines, and half a line at its end."""
    if not path.exists():
        return
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    # A killed run may have left half a line at the end.
    whole = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] < step]
    write_atomically(path, "".join(whole))


class atomic_folder:
    """Context manager: fill a temporary sibling, which then takes the final name; on any error it is removed.

    Running out of disk space (or of permission) becomes a UserError that names the folder.
    """

    def __init__(self, path: Path):
        self.path = path
        self.temporary = path.with_name(f".{path.name}.partial")

    def __enter__(self) -> Path:
        shutil.rmtree(self.temporary, ignore_errors=True)
        try:
            self.temporary.mkdir(parents=True)
        except OSError as error:
            raise _save_error(self.path, error) from error
        return self.temporary

    def __exit__(self, kind, error, traceback) -> None:
        try:
            if error is None:
                for file in self.temporary.rglob("*"):
                    _sync(file)
                if self.path.exists():
                    shutil.rmtree(self.path)
                self.temporary.rename(self.path)
        except OSError as failure:
            error = failure
        if error is not None:
            shutil.rmtree(self.temporary, ignore_errors=True)
        if isinstance(error, (OSError, SafetensorError)):
            raise _save_error(self.path, error) from error


def _save_error(path: Path, error: Exception) -> UserError:
    return UserError(
        f"{path} could not be saved ({error}): nothing of it was kept; make room or permission there, then go on "
        "from the last checkpoint with --resume."
    )


def _sync(file: Path) -> None:
    if file.is_file():
        with file.open("rb") as handle:
            os.fsync(handle.fileno())
