"""Reading back what a run or an experiment has recorded, which may be unfinished or damaged."""

import json
import math
from pathlib import Path

import numpy as np

from ..errors import UserError


def json_object(source: str, where: object) -> dict:
    """The JSON object in the text `source`; UserError, naming `where`, if there is none."""
    try:
        return dict(json.loads(source))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{where} is no JSON object: remove it.") from error


def read_json_object(path: Path) -> dict:
    """The JSON object in the file `path`; UserError, which names the file, if there is none."""
    return json_object(path.read_text(encoding="utf-8", errors="replace"), path)


def read_metrics(path: Path) -> dict[str, np.ndarray]:
    """The metrics of a file of JSON lines: name → float64 array of shape (steps,).

    A value that is missing or not finite is NaN. `step` is always there, and all arrays are empty
    if there is no file. Raises UserError for a line that is no JSON object.
    """
    written = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""

    # A line without its end is being written at this moment, or the run was killed at it.
    lines = written.split("\n")[:-1]
    rows = [
        {"step": step, **json_object(line, f"{path} line {step + 1}")}
        for step, line in enumerate(lines)
    ]
    names = dict.fromkeys(["step", *(name for row in rows for name in row)])
    return {name: np.array([_number(row.get(name)) for row in rows]) for name in names}


def _number(value: object) -> float:
    # Axes overflow near the largest floats, and such a value says no more than infinity does.
    return float(value) if isinstance(value, int | float) and abs(value) < 1e100 else math.nan
