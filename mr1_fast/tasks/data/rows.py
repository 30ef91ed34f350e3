"""Reading the rows of one split from a file, a folder or the Hub."""

import math
import os
import re
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import yaml

from ...errors import UserError, shortened
from ...hub import files_to_load, hub_splits, load_splits, split_files
from .options import DataOptions
from .readers import READERS, Row
from .saved_folders import check_saved, is_outside
from .splits import SHARD, choose_split, split_in_name
from .text_files import check_memory, opened
from .unpacked_size import check_unpacked

FILE_FORMATS = {".parquet": "parquet", ".arrow": "arrow"}
"""The name that `datasets` has for the format of a file, by the file's suffix."""
SUFFIXES = (*READERS, *FILE_FORMATS)
"""The suffixes of files that can be read."""
LONGEST_README = 2**22
"""The most characters of a data set's README.md."""
MOST_PARTS = 100_000
"""The most values in its head."""
NOT_ROWS = {
    *("config.json", "state.json", "dataset_dict.json", "dataset_info.json", "dataset_infos.json")
}
"""Files of a data set that describe it."""


def read_rows(data: str, path: Path, split: str, options: DataOptions) -> Sequence:
    """Read the rows of a split from the file or folder `path`, or of the Hub's data set `data`.

    Raises UserError, which names the way out, if they cannot be read or there is no such split.
    """
    if os.path.isfile(path):  # the method would raise an error for a name that is too long
        _check_whole(split_in_name(Path(path.name)) or "train", path, split, options)
        return _read_file(path)
    if os.path.isdir(path):
        return _folder_rows(path, split, options)
    if os.path.lexists(path):
        raise UserError(f"{data} is neither a regular file nor a folder: give the path of one.")
    looks_like_a_path = (
        path.suffix in SUFFIXES or data.startswith((".", "/", "~")) or data.count("/") > 1
    )
    if looks_like_a_path:
        raise UserError(f"{data} is missing: check the path of the data.")
    splits = _configured(lambda config: hub_splits(data, config), options)
    return splits[choose_split(list(splits), split, options, data)]


def _check_whole(own: str, path: Path, split: str, options: DataOptions) -> None:
    """Raise UserError if a run trains on the data `path`, which has the one split `own`.

    Such data are otherwise taken as a whole, whatever they are called.
    """
    if options.trained is not None:
        only = DataOptions(split=options.split, held_out=options.held_out, trained=own)
        choose_split([own], split, only, str(path))


def _read_file(path: Path) -> Sequence:
    """Read all rows of a file."""
    suffix = path.suffix.lower()
    if suffix in READERS:
        check_memory([path])
        return READERS[suffix](path)
    if suffix not in FILE_FORMATS:
        raise UserError(f"{path} has an unknown format: give one of {', '.join(SUFFIXES)}.")
    return _load(str(path), FILE_FORMATS[suffix], data_files=str(path))["train"]


def _load(source: str, *args: str | None, **kwargs: str) -> dict[str, Sequence]:
    """Let `datasets` read local files, after a look at what they unpack to."""
    check_unpacked(source, *files_to_load(source, *args, **kwargs))
    return load_splits(source, *args, **kwargs)


def _folder_rows(folder: Path, split: str, options: DataOptions) -> Sequence:
    """Read a folder: what `save_to_disk` wrote, the files of a README.md, files of rows, or what
    `datasets` understands.
    """
    if any((folder / name).exists() for name in ("dataset_dict.json", "state.json")):
        return _saved_rows(folder, split, options)
    source = str(folder.resolve())
    configured = _has_configurations(folder)
    if configured:
        splits = _configured(lambda config: split_files(str(folder), source, config), options)
    else:
        splits = _row_files(folder, (options.split, options.trained))
        if splits and options.config and not options.lenient:
            raise UserError(
                f"{folder} has no configurations, for its README.md names none: leave out "
                "--data-config."
            )
    files = [path for paths in splits.values() for path in paths]
    if files and all(path.suffix.lower() in READERS for path in files):
        chosen = splits[choose_split(list(splits), split, options, str(folder))]
        if not configured:
            _check_shards(chosen, split, folder)
        check_memory(chosen)
        return [row for path in chosen for row in _rows_beside_images(path, folder)]
    splits = _configured(lambda config: _load(str(folder), source, config), options)
    return splits[choose_split(list(splits), split, options, str(folder))]


def _configured(read: Callable[[str | None], dict], options: DataOptions) -> dict:
    """Return what `read(configuration)` returns for the configuration that is wanted.

    Held-out data of their own need not have the configuration of the training data.
    """
    if options.config is None or not options.lenient:
        return read(options.config)
    try:
        return read(options.config)
    except UserError:
        return read(None)


def _saved_rows(folder: Path, split: str, options: DataOptions) -> Sequence:
    """Read what `save_to_disk` wrote: a DatasetDict, or a Dataset, which is taken as a whole."""
    import datasets  # takes seconds to import, and runs on drawn data never need it

    check_unpacked(str(folder), "Arrow", check_saved(folder))
    try:
        saved = datasets.load_from_disk(str(folder))
    except Exception as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(
            f"{folder} could not be loaded ({type(error).__name__}: {reason}): save it again."
        ) from error
    if isinstance(saved, dict):
        return saved[choose_split(list(saved), split, options, str(folder))]
    _check_whole("train", folder, split, options)
    return saved


def _has_configurations(folder: Path) -> bool:
    """Return whether the head of a folder's README.md says which files are which split.

    Raises UserError for a README.md that is too long, since `datasets` would read all of it.
    """
    readme = folder / "README.md"
    if not readme.is_file():
        return False
    with opened(readme) as file:
        text = file.read(LONGEST_README + 1).decode("utf-8", "replace")
    if len(text) > LONGEST_README:
        raise UserError(f"{readme} has more than {LONGEST_README:,} characters: shorten it.")
    head = re.match(r"---\r?\n(.*?)\r?\n---", text, re.DOTALL)
    if head is None:
        return False
    configured = re.search(r"^configs:", head[1], re.MULTILINE) is not None
    try:
        value = yaml.safe_load(head[1])
        bomb = _written_out(value, {}) > MOST_PARTS
    except (yaml.YAMLError, ValueError, RecursionError, TypeError) as error:
        if not configured:
            return False  # nothing of it is needed
        raise UserError(
            f"the head of {readme} is no YAML ({shortened(error, 120)}): correct or remove it."
        ) from error
    if bomb:
        raise UserError(f"the head of {readme} has aliases without an end: write it without them.")
    if configured:
        _check_inside(value.get("configs") if isinstance(value, dict) else None, readme)
    return configured


def _written_out(value: Any, sizes: dict[int, float]) -> float:
    """Return how many parts a value of YAML has with its aliases written out; infinity where it
    holds itself. `sizes` has what is known, by identity.
    """
    if not isinstance(value, dict | list):
        return 1
    if id(value) not in sizes:
        sizes[id(value)] = math.inf
        parts = value.values() if isinstance(value, dict) else value
        sizes[id(value)] = 1 + sum(_written_out(part, sizes) for part in parts)
    return sizes[id(value)]


def _check_inside(part: Any, readme: Path) -> None:
    """Raise UserError where configurations name a file that lies outside of the folder."""
    if isinstance(part, dict | list):
        for each in part.values() if isinstance(part, dict) else part:
            _check_inside(each, readme)
    elif isinstance(part, str) and (is_outside(part) or _is_elsewhere(part)):
        raise UserError(
            f"{readme} names {shortened(part)}, which is outside its folder: put it there, and "
            "correct README.md."
        )


def _is_elsewhere(part: str) -> bool:
    """Return whether a text is an address, other than one on the Hugging Face Hub."""
    return "://" in part and not part.startswith("hf://")


def _row_files(folder: Path, own_names: Sequence[str | None]) -> dict[str, list[Path]]:
    """Return the text files that list the rows of a folder, by split: those at its top, or else
    those in folders below.

    There are none where the folder holds tables, unless lines of JSON lie at its top.
    """
    files = [path for path in sorted(folder.rglob("*")) if _may_hold_rows(path, folder)]
    lists = [path for path in files if path.suffix.lower() in READERS]
    lists = [path for path in lists if path.parent == folder] or lists
    has_lines = any(path.suffix == ".jsonl" and path.parent == folder for path in lists)
    if len(lists) < len(files) and not has_lines and any(p.suffix in FILE_FORMATS for p in files):
        return {}
    # A file of that name lists images for `datasets`; others hold rows in the layouts read here.
    lists = [path for path in lists if path.stem != "metadata"] or lists
    splits: dict[str, list[Path]] = {}
    for path in lists:
        mentioned = split_in_name(path.relative_to(folder), own_names)
        splits.setdefault(mentioned or "train", []).append(path)
    return splits


def _may_hold_rows(path: Path, folder: Path) -> bool:
    """Return whether a file of a folder has a known format and is not hidden."""
    hidden = any(part.startswith((".", "__")) for part in path.relative_to(folder).parts)
    known = path.suffix.lower() in SUFFIXES and path.name not in NOT_ROWS
    return known and not hidden and path.is_file()


def _check_shards(files: list[Path], split: str, folder: Path) -> None:
    """Raise UserError unless the files of a split are one, or shards with the Hub's numbers."""
    if len(files) > 1 and not all(SHARD.search(path.stem) for path in files):
        names = ", ".join(path.name for path in files[:5]) + " …" * (len(files) > 5)
        raise UserError(
            f"{folder} holds {names}, not exactly one for {split}: pass the file itself as data."
        )


def _rows_beside_images(path: Path, folder: Path) -> list[Row]:
    """Read a file of rows; the images of a metadata file lie in the folder of that file."""
    rows = READERS[path.suffix.lower()](path)
    if path.stem == "metadata":
        within = path.parent.resolve().relative_to(folder.resolve())
        for row in rows:
            if isinstance(row.get("file_name"), str):
                row["file_name"] = (within / row["file_name"]).as_posix()
    return rows
