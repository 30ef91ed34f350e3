"""Rows by their number, whether they are a list of dictionaries or a `datasets.Dataset`."""

import json
from collections.abc import Sequence
from typing import Any

from ...errors import UserError, shortened


class Table:
    """Rows of data, each of which is read as a dictionary; images stay encoded.

    It may be read from several threads at once.
    """

    def __init__(self, rows: Sequence) -> None:
        """Prepare to read a list of dictionaries, or a `datasets.Dataset`."""
        self._features: dict[str, Any] = {}
        if isinstance(rows, list):
            self.names = list(dict.fromkeys(name for row in rows for name in row))
        else:
            self.names = list(rows.column_names)
            self._features = {
                name: feature for name, feature in rows.features.items() if _holds_json(feature)
            }
            # The format "arrow" leaves images encoded, so that a broken one is reported with its
            # row.
            rows = rows.with_format("arrow")
        self._rows = rows

    def __len__(self) -> int:
        return len(self._rows)

    def row(self, index: int) -> dict[str, Any]:
        """Return a row, which the caller must not change.

        Raises UserError for a cell that should hold JSON and does not.
        """
        if isinstance(self._rows, list):
            return self._rows[index]
        table = self._rows[index]
        table.validate(full=True)  # or a broken file of Arrow could end the process
        row = table.to_pylist()[0]
        for name, feature in self._features.items():
            try:
                row[name] = _parsed(feature, row[name])
            except (ValueError, RecursionError) as error:
                raise UserError(
                    f"row {index + 1} has in {shortened(name)!r} no JSON ({error}): correct it, or "
                    "leave the row out."
                ) from error
        return row


def _is_json(feature: Any) -> bool:
    """Return whether a column of this type holds JSON, as `datasets` writes mixed values."""
    return type(feature).__name__ == "Json"


def _inner(feature: Any) -> Any:
    """Return the type of the entries of a list; None for a type that is no list."""
    return feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)


def _holds_json(feature: Any) -> bool:
    """Return whether a column of this type holds JSON at any depth."""
    if isinstance(feature, dict):
        return any(map(_holds_json, feature.values()))
    inner = _inner(feature)
    return _is_json(feature) or (inner is not None and _holds_json(inner))


def _parsed(feature: Any, value: Any) -> Any:
    """Return a cell with the JSON in it parsed."""
    if value is None:
        return None
    if _is_json(feature):
        return json.loads(value)
    if isinstance(feature, dict):
        return {name: _parsed(each, value[name]) for name, each in feature.items()}
    inner = _inner(feature)
    return value if inner is None else [_parsed(inner, each) for each in value]
