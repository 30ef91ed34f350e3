"""What `save_to_disk` has written, looked at before `datasets` reads it.

`datasets` opens whatever such a folder names: a pipe, on which it would wait, or a file elsewhere.
"""

import json
import os
from pathlib import Path
from typing import Any

from ...errors import UserError, shortened
from .text_files import opened

LONGEST = 2**24
"""The most bytes of a file that describes a data set."""
MOST_FILES = 10_000
"""The most files of rows that a data set may name; each of them is opened."""


def check_saved(folder: Path) -> list[Path]:
    """Return the files of rows in a folder of `save_to_disk`.

    Raises UserError for a folder that is damaged, or names files outside of it.
    """
    if os.path.lexists(folder / "state.json") and not (folder / "dataset_dict.json").is_file():
        return _checked_files(folder)
    files = []
    splits = _described(folder / "dataset_dict.json", "splits")
    for name in splits:
        if not isinstance(name, str) or name in (".", "..") or "/" in name or "\0" in name:
            raise _damaged(folder / "dataset_dict.json", f"it names the split {name!r}")
        files += _checked_files(folder / name)
    return files


def _checked_files(folder: Path) -> list[Path]:
    """Return a data set's files; raises UserError unless they are regular files in its folder."""
    files = []
    state = folder / "state.json"
    _described(folder / "dataset_info.json", None)
    for entry in _described(state, "_data_files"):
        name = entry.get("filename") if isinstance(entry, dict) else None
        if not isinstance(name, str) or "\0" in name:
            raise _damaged(state, "it has an entry without a file's name")
        if is_outside(name):
            raise _damaged(state, f"it names {shortened(name)}, which is outside its folder")
        with opened(folder / name):
            files.append(folder / name)
    return files


def is_outside(name: str) -> bool:
    """Return whether a path that data names leaves the folder of the data.

    Links are not followed: what the Hub's cache holds are links to its files.
    """
    return os.path.isabs(name) or ".." in name.split("/") or name.startswith("~")


def _described(path: Path, key: str | None) -> list[Any]:
    """Return a list that a file of a data set holds under a key; without one, nothing."""
    with opened(path) as file:
        content = file.read(LONGEST + 1)
    if len(content) > LONGEST:
        raise _damaged(path, f"it has more than {LONGEST // 2**20} MiB")
    try:
        value = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise _damaged(path, f"it is no JSON, {error}") from error
    if not isinstance(value, dict):
        raise _damaged(path, "it is no JSON object")
    entries = [] if key is None else value.get(key)
    if not isinstance(entries, list) or len(entries) > MOST_FILES:
        raise _damaged(path, f"its {key!r} is no list of at most {MOST_FILES:,} entries")
    return entries


def _damaged(path: Path, reason: str) -> UserError:
    """Return the error for a file of a data set that cannot be used."""
    return UserError(
        f"{path} is damaged ({shortened(reason, 160)}): save the data set again with save_to_disk."
    )
