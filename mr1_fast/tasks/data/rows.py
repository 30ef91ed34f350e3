"""Reading the rows of one split from a file or a folder."""

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ...errors import UserError
from ...hub import load_splits
from ..split import SPLITS
from .loaded import column_names

FILE_FORMATS = {".parquet": "parquet", ".arrow": "arrow", ".json": "json", ".csv": "csv"}
"""The name that `datasets` has for the format of a file, by the file's suffix."""
SUFFIXES = (".jsonl", *FILE_FORMATS)
"""The suffixes of files that can be read; lines of JSON (`.jsonl`) are read here."""


def file_rows(path: Path, split: str) -> Sequence:
    """Read a file, which belongs to one split.

    That is the split that the file's name mentions, or else test if it has the columns of R1-V's
    test sets, or else train. Raises UserError for a file that cannot be read or belongs to another
    split.
    """
    if path.suffix == ".jsonl":
        rows = _read_json_lines(path)
    elif path.suffix in FILE_FORMATS:
        rows = load_splits(str(path), FILE_FORMATS[path.suffix], data_files=str(path))["train"]
    else:
        raise UserError(f"{path} has an unknown format: give one of {', '.join(SUFFIXES)}.")
    is_test_set = len(rows) and "ground_truth" in column_names(rows)
    its_split = _split_in_name(path) or ("test" if is_test_set else "train")
    return pick({its_split: rows}, split, str(path))


def folder_rows(folder: Path, split: str) -> Sequence:
    """Read a folder: lists of JSON lines, what `save_to_disk` wrote, or what `datasets`
    understands.

    Raises UserError if that fails, or if the folder has not exactly one list for the split.
    """
    # A metadata.jsonl describes a folder of images to `datasets`; other lists hold R1-V's rows.
    lists = sorted(path for path in folder.glob("*.jsonl") if path.name != "metadata.jsonl")
    if len(lists) == 1:
        return file_rows(lists[0], split)
    if lists:
        named = [path for path in lists if (_split_in_name(path) or "train") == split]
        if len(named) != 1:
            names = ", ".join(path.name for path in lists)
            raise UserError(
                f"{folder} holds {names}, not exactly one for {split}: pass the file itself as "
                "data."
            )
        return file_rows(named[0], split)
    if any((folder / name).exists() for name in ("dataset_dict.json", "state.json")):
        return _saved_rows(folder, split)
    return pick(load_splits(str(folder), str(folder.resolve())), split, str(folder))


def pick(splits: dict[str, Sequence], split: str, source: str) -> Sequence:
    """Return the rows of one split; raises UserError, which lists the others, if it is missing."""
    if split not in splits:
        found = ", ".join(splits)
        raise UserError(
            f"{source} has only the split {found}: for {split}, pass other data or a file named "
            "after it."
        )
    return splits[split]


def _saved_rows(folder: Path, split: str) -> Sequence:
    """Read what `save_to_disk` wrote: a DatasetDict, or a Dataset, which is taken for train."""
    import datasets  # takes seconds to import, and runs on drawn data never need it

    loaded = datasets.load_from_disk(str(folder))
    return pick(loaded if isinstance(loaded, dict) else {"train": loaded}, split, str(folder))


def _read_json_lines(path: Path) -> list[dict[str, Any]]:
    """Read a file of one JSON object per line; raises UserError, which names the line, for another.

    `datasets` would guess types (dates, or numbers mixed with text) and would not name the bad
    line.
    """
    rows = []
    for number, line in enumerate(path.read_bytes().splitlines(), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except ValueError as error:
            raise UserError(
                f"line {number} of {path} is not JSON ({error}): correct or remove it."
            ) from error
        if not isinstance(row, dict):
            raise UserError(
                f"line {number} of {path} is not a JSON object: write one object with columns "
                "a line."
            )
        rows.append(row)
    return rows


def _split_in_name(path: Path) -> str | None:
    """Return the split that is a word of the file's name, as in `geoqa_test_prompts.jsonl`."""
    name = path.stem.lower()
    for split in SPLITS:
        if re.search(rf"(?<![a-z]){split}(?![a-z])", name):
            return split
    return None
