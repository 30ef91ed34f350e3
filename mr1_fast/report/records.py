"""Reading back what a run or an experiment has recorded, which may be unfinished or damaged."""

import json
import math
from array import array
from collections.abc import Iterator
from itertools import count
from pathlib import Path

import numpy as np

from ..errors import UserError, shortened
from ..file_kinds import require_file

LARGEST = 1e100
"""Values from here on are shown as missing: axes overflow near the largest floats, and such a value
says no more than infinity does."""
PROCESSES = "processes.json"
"""The file with the number of processes and the kind of sharding, where several have trained."""
LAST_BYTES = 2**24
"""How much of the end of completions.jsonl is looked at for the last step, 16 MiB."""
LONGEST_LINE = 2**28
"""Bytes of a line of a record that are read at most, 256 MiB."""


def json_object(source: str | bytes, where: object) -> dict:
    """The JSON object in `source`; UserError, naming `where`, if there is none.

    An integer beyond the largest float becomes infinite, as JSON's other numbers do.
    """
    try:
        found = json.loads(source, parse_int=_integer)
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{where} is no JSON object: remove it.") from error
    if not isinstance(found, dict):
        raise UserError(f"{where} is no JSON object: remove it.")
    return found


def read_json_object(path: Path) -> dict:
    """The JSON object in the file `path`; UserError, which names the file, if there is none."""
    require_file(path)
    try:
        return json_object(path.read_text(encoding="utf-8", errors="replace"), path)
    except OSError as error:
        raise _unreadable(path, error) from error


def read_steps(path: Path, several: bool = False) -> Iterator[tuple[int, dict, int]]:
    """The lines of a record by step: step, JSON object, and at which byte of the file it ends.

    It is the strict reader, for whoever goes on with the file. Steps must rise, or with `several`
    lines for a step must not fall. Memory holds one line. A last line without its end, which a
    killed process may have left, is no line. Raises UserError, which names the line, for any other
    damage.
    """
    if not path.exists() and not path.is_symlink():
        return
    if not path.is_file():
        raise UserError(f"{path} is no file: move it away.")
    last, end = -1, 0
    try:
        with path.open("rb") as file:
            for number in count(1):
                line = file.readline(LONGEST_LINE)
                where = f"{path} line {number}"
                if not line.endswith(b"\n"):
                    if len(line) == LONGEST_LINE:
                        raise UserError(f"{where} has no end: remove it.")
                    return
                record = json_object(line, where)
                step = record.get("step")
                if type(step) is not int or step < 0:
                    raise UserError(f"{where} has no step, a number from 0 on: remove it.")
                if step < last or (step == last and not several):
                    seen = f"{shortened(step)} after step {shortened(last)}"
                    raise UserError(f"{where} has step {seen}: remove it.")
                last, end = step, end + len(line)
                yield step, record, end
    except OSError as error:
        raise _unreadable(path, error) from error


def end_before(path: Path, step: int, several: bool = False) -> int:
    """Where the lines of earlier steps end in a record, in bytes, on the terms of `read_steps`."""
    if step <= 0:
        return 0
    ends = (end for found, _, end in read_steps(path, several) if found < step)
    return max(ends, default=0)


def _unreadable(path: Path, error: OSError) -> UserError:
    return UserError(f"{path} cannot be read ({error.strerror}): check its permissions.")


def read_lines(path: Path) -> Iterator[dict]:
    """The JSON objects of a file of lines, one at a time; none if there is no file.

    Raises UserError, which names the line, for one that is no JSON object.
    """
    if not path.exists():
        return
    require_file(path)
    with path.open(encoding="utf-8", errors="replace", newline="\n") as file:
        for number, line in enumerate(file, start=1):
            # A line without its end is being written at this moment, or the run was killed at it.
            if line.endswith("\n"):
                yield json_object(line, f"{path} line {number}")


def read_evaluation(path: Path) -> dict:
    """The accuracies and examples of evaluation.json; {} if there is no such file.

    Raises UserError, which names the file, unless it has all that a page or a card reads of it.
    """
    if not path.exists():
        return {}
    evaluation = read_json_object(path)
    results = [evaluation.get(when) or {} for when in ("before", "after")]
    examples = evaluation.get("examples") or []
    whole = (
        all(isinstance(each, dict) and (not each or "greedy" in each) for each in results)
        and all(_is_summary(figures) for each in results for figures in each.values())
        and isinstance(examples, list)
        and all(map(_is_example, examples))
        and isinstance(evaluation.get("final_step", 0), int)
        and all(isinstance(evaluation.get(name, ""), str) for name in ("task", "split", "judge"))
    )
    if not whole:
        raise UserError(f"{path} is damaged: remove it.")
    return evaluation


def _is_summary(figures: object) -> bool:
    """Whether something is the accuracy of a way to answer, with its interval and counts."""
    if not isinstance(figures, dict):
        return False
    interval = figures.get("interval")
    shares = [figures.get("accuracy"), *(interval if isinstance(interval, list) else [])]
    return (
        len(shares) == 3
        and all(isinstance(share, int | float) and 0 <= share <= 1 for share in shares)
        and all(isinstance(figures.get(name), int) for name in ("correct", "count"))
    )


def _is_example(example: object) -> bool:
    """Whether something is a held-out item with its images and answers."""
    if not isinstance(example, dict) or not {"problem", "solution"} <= example.keys():
        return False
    images, answers = example.get("images"), [example.get(w) or {} for w in ("before", "after")]
    return (
        isinstance(images, list)
        and all(isinstance(name, str) for name in images)
        and all(isinstance(a, dict) and (not a or {"text", "correct"} <= a.keys()) for a in answers)
    )


def read_metrics(path: Path) -> dict[str, np.ndarray]:
    """The metrics of a file of JSON lines: name → float64 array of shape (steps,).

    A value that is missing or not finite is NaN. `step` is always there, and all arrays are empty
    if there is no file. The file is read line by line, so memory holds the numbers alone. Raises
    UserError for a line that is no JSON object.
    """
    columns = {"step": array("d")}
    count = 0
    for row in read_lines(path):
        row.setdefault("step", count)
        for name, value in row.items():
            if name not in columns:
                columns[name] = array("d")
            column = columns[name]
            if len(column) < count:  # steps that did not have it
                column.extend([math.nan] * (count - len(column)))
            column.append(value if type(value) is float else _number(value))
        count += 1

    metrics = {}
    for name, column in columns.items():
        values = np.full(count, np.nan)
        values[: len(column)] = column
        values[~(np.abs(values) < LARGEST)] = np.nan
        metrics[name] = values
    return metrics


def read_evaluations(path: Path) -> dict[str, np.ndarray]:
    """The evaluations during training: `step`, `accuracy`, `low`, `high` and `seconds`, each (n,).

    Every line of the file has the number of steps that were done, 0 before training; the interval
    is split into its ends. What is missing is NaN, and all arrays are empty if there is no file.
    Raises UserError for a line that is no JSON object.
    """
    names = ("step", "accuracy", "low", "high", "seconds")
    rows = []
    for row in read_lines(path):
        interval = row.get("interval")
        if isinstance(interval, list) and len(interval) == 2:
            row |= {"low": interval[0], "high": interval[1]}
        rows.append([_number(row.get(name)) for name in names])
    values = np.array(rows, dtype=float).reshape(-1, len(names))
    return dict(zip(names, values.T, strict=True))


def read_last_step(path: Path) -> list[dict]:
    """The records of the last step in completions.jsonl, as far as LAST_BYTES reach back.

    Only the end of the file is read, which may be far larger. Raises UserError for a line that is
    no JSON object.
    """
    if not path.exists():
        return []
    require_file(path)
    with path.open("rb") as file:
        start = max(0, file.seek(0, 2) - LAST_BYTES)
        file.seek(start)
        lines = file.read(LAST_BYTES).split(b"\n")
    # The first line may have lost its beginning, and the last one is being written.
    whole = lines[bool(start) : -1]

    records: list[dict] = []
    for line in reversed(whole):
        record = json_object(line, f"a line at the end of {path}")
        if not isinstance(record.get("completions", []), list):
            raise UserError(f"a line at the end of {path} has no completions: remove it.")
        if records and record.get("step") != records[0].get("step"):
            break
        records.insert(0, record)
    return records


def _integer(digits: str) -> int | float:
    """An integer of JSON, or infinity where no float is as large."""
    return int(digits) if len(digits) <= 300 else float(digits)


def _number(value: object) -> float:
    return float(value) if isinstance(value, int | float) and abs(value) < LARGEST else math.nan
