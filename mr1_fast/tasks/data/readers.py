"""Reading files of rows that are text: JSON, JSON lines, CSV and TSV.

What stands in the file is what arrives. `datasets` would guess types (dates, numbers, missing
values), would write a column of numbers and texts as JSON, and would not name the bad line.
"""

import csv
import json
from collections import Counter
from pathlib import Path
from typing import Any

from ...errors import UserError, shortened
from .text_files import LONGEST_LINE, text_lines, whole_text

Row = dict[str, Any]


def read_json(path: Path) -> list[Row]:
    """Read an array of objects, an object whose `data` is one, or lines of JSON.

    Raises UserError, which names the line or row, for anything else.
    """
    text = whole_text(path)
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as error:
        if text.lstrip().startswith("{") and _is_json(text.lstrip().split("\n", 1)[0]):
            return read_json_lines(path)
        line = getattr(error, "lineno", 1)
        raise UserError(
            f"line {line} of {path} is not JSON ({error}): correct or remove it."
        ) from error

    if isinstance(value, dict):
        value = value["data"] if isinstance(value.get("data"), list) else [value]
    if not isinstance(value, list):
        raise UserError(f"{path} is not an array of objects: write one object for each row.")
    for number, row in enumerate(value, start=1):
        if not isinstance(row, dict):
            raise UserError(
                f"row {number} of {path} is not a JSON object: write one object with columns for "
                "each row."
            )
    return value


def read_json_lines(path: Path) -> list[Row]:
    """Read a file of one JSON object a line; raises UserError, which names the line, for
    another.
    """
    rows = []
    for number, line in enumerate(text_lines(path, "\n"), start=1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as error:
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


def read_csv(path: Path) -> list[Row]:
    """Read a table with a line of names above it; every cell is text, and an empty one is None.

    Cells are separated by tabs in a .tsv file, else by commas. Raises UserError, which names the
    line, for a row that does not fit the names.
    """
    csv.field_size_limit(LONGEST_LINE)
    delimiter = "\t" if path.suffix.lower() == ".tsv" else ","
    lines = csv.reader(text_lines(path, ""), delimiter=delimiter, strict=True)
    rows, names = [], None
    try:
        for cells in lines:
            if not cells:
                continue
            if names is None:
                names = [name.strip() for name in cells]
                _check_names(names, path)
            elif len(cells) == len(names):
                rows.append({name: cell or None for name, cell in zip(names, cells, strict=True)})
            else:
                raise UserError(
                    f"line {lines.line_num} of {path} ends a row of {len(cells)} cells, but there "
                    f"are {len(names)} columns: quote cells that hold the separator, or add what "
                    "is missing."
                )
    except csv.Error as error:
        raise UserError(
            f"line {lines.line_num} of {path} is no row of a table ({error}): quote its cells "
            "correctly or remove it."
        ) from error
    return rows


READERS = {
    ".jsonl": read_json_lines,
    ".json": read_json,
    ".csv": read_csv,
    ".tsv": read_csv,
}
"""The reader of a file by its suffix."""


def _check_names(names: list[str], path: Path) -> None:
    """Raise UserError where two columns have the same name."""
    twice = [name for name, count in Counter(names).items() if count > 1]
    if twice:
        raise UserError(f"{path} has two columns {shortened(twice[0])!r}: give each its own name.")


def _is_json(line: str) -> bool:
    """Return whether a line is JSON by itself."""
    try:
        json.loads(line)
    except (ValueError, RecursionError):
        return False
    return True
