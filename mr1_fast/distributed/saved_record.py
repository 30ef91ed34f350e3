"""The record of a checkpoint, `state.json`: read and checked with all files that it names.

Nothing of a checkpoint is used before all of it has been found as it was written. What is wrong
with one is a `Damaged`, on all processes alike.
"""

import re
from collections.abc import Mapping, Sequence
from math import isfinite
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from ..errors import shortened
from ..file_kinds import is_no_file
from ..integrity import FileChecks, finding, is_file_checks, raise_unless_damaged, read_sealed
from ..resuming import step_folder
from .shard_files import OFFSETS, ShardReader
from .world import World

WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"
"""The files of a process alone; of several, each has its number in the first two names."""
OF_WEIGHTS = ("step", "files")
"""What a record has where weights alone are kept."""
OF_ALL = ("step", "start", "optimizer", "optimizer_numbers")
"""What the record of a checkpoint has at least."""
EARLIER = {*OF_WEIGHTS, *OF_ALL, "parts"}
"""All that records had before they had checksums of themselves."""

_NAME = re.compile(r"(weights|optimizer)(-\d{5}-of-\d{5})?\.safetensors")
_LARGEST = 2**63
"""No number that is kept is as large."""


class Damaged(Exception):
    """A checkpoint is not what was written; the message names what is wrong."""


def sound_record(path: Path, world: World, keys: Sequence[str]) -> dict[str, Any]:
    """Return the record of the checkpoint in `path`, once all of its files have been checked.

    keys: OF_ALL, or OF_WEIGHTS for weights alone, which had no record in earlier versions.

    Collective: the first process reads the record, and each checks a part of the files.
    """
    weights_alone = keys == OF_WEIGHTS

    def read() -> dict[str, Any]:
        if weights_alone and not (path / STATE).exists():
            return {}
        record = read_sealed(path / STATE, EARLIER)
        if wrong := _wrong_entry(record, path, keys):
            raise ValueError(f"{STATE} {wrong}")
        return record

    try:
        record = world.of_first(world.in_all(lambda: read() if world.is_first else {}))
        files = record.get("files")
        if files is None:
            files = dict.fromkeys([WEIGHTS] if weights_alone else [WEIGHTS, OPTIMIZER])
        world.in_all(lambda: _require_no_others(path, files) if world.is_first else None)
    except ValueError as error:
        raise Damaged(str(error)) from error

    def look() -> list[str]:
        return [_finding(path / name, check) for name, check in world.share(list(files.items()))]

    for found in world.whole(world.in_all(look)):
        if found:
            raise Damaged(found)
    return record


def _wrong_entry(record: Mapping[str, Any], path: Path, keys: Sequence[str]) -> str:
    """Say which entry of a record is missing or cannot be; "" for none."""
    for key in keys:
        if key not in record and (key != "files" or "step" not in record):
            return f"has no {key}"
    step, parts = record["step"], record.get("parts", {})
    if type(step) is not int or not 0 <= step < _LARGEST:
        return f"has {shortened(step)} for step"
    if step_folder(path.parent, step) != path:
        return f"is that of step {step}"
    if keys == OF_ALL:
        for key in ("start", "optimizer"):
            if not isinstance(record[key], str):
                return f"has no text for {key}"
        if not _are_numbers(record["optimizer_numbers"]):
            return "has no numbers for optimizer_numbers"
        if not isinstance(parts, dict) or not all(map(_are_numbers, parts.values())):
            return "has no numbers for parts"
    if "files" in record and not _are_files(record["files"]):
        return "names no files"
    return ""


def _are_numbers(value: object) -> bool:
    """Return whether something is a mapping of names to finite numbers."""
    return isinstance(value, dict) and all(
        type(number) in (int, float) and abs(number) < _LARGEST and isfinite(number)
        for number in value.values()
    )


def _are_files(files: object) -> bool:
    return (
        is_file_checks(files)
        and all(map(_NAME.fullmatch, files))
        and any(name.startswith(Path(WEIGHTS).stem) for name in files)
    )


def _require_no_others(path: Path, files: FileChecks) -> None:
    """Raise ValueError where a folder has weights or states that the record does not name."""
    try:
        found = {each.name for each in path.iterdir() if _NAME.fullmatch(each.name)}
    except OSError as error:
        raise_unless_damaged(path, error)
        raise ValueError(f"{path.name}: {error.strerror}") from error
    if others := sorted(found - files.keys()):
        raise ValueError(f"{shortened(others[0])} is no file of it")


def _finding(path: Path, expected: Mapping[str, Any] | None) -> str:
    """Say what is wrong with a file, "" for nothing; earlier versions have no checksum of it."""
    if expected is not None:
        return finding(path, expected)
    if is_no_file(path):
        return f"{path.name} is no file"
    try:
        with safe_open(path, "pt") as file:
            has_record = OFFSETS in (file.metadata() or {})
            return f"{STATE} does not name {path.name}" if has_record else ""
    except FileNotFoundError:
        return f"{path.name} is missing"
    except OSError as error:
        raise_unless_damaged(path, error)
        return f"{path.name}: {error.strerror}"
    except SafetensorError as error:
        return f"{path.name}: {error}"


def reader_of(path: Path, record: Mapping[str, Any], kind: str) -> ShardReader:
    """Return the reader of all files of weights, or of the optimizer."""
    files = record.get("files") or [kind]
    return ShardReader([path / name for name in files if name.startswith(Path(kind).stem)])


def optimizer_reader(
    path: Path, record: Mapping[str, Any], trained: Sequence[str]
) -> tuple[ShardReader, dict[str, Any]]:
    """Return the reader of the optimizer's tensors, and its numbers.

    Earlier versions have the numbers of the trained parameters in place of their names. Raises
    ValueError for numbers that no parameter has.
    """
    numbers = record["optimizer_numbers"]
    if "files" in record:
        return reader_of(path, record, OPTIMIZER), numbers

    def rename(key: str) -> str:
        number, *_, name = key.split(".")
        if not (number.isdecimal() and int(number) < len(trained)):
            raise ValueError(f"{shortened(key)} is of no parameter")
        return f"{trained[int(number)]}.{name}"

    renamed = {rename(key): value for key, value in numbers.items()}
    return ShardReader([path / OPTIMIZER], rename), renamed
