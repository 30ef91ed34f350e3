"""Examples made of rows of data, in the columns of R1-V's training data or test sets."""

import re
from collections.abc import Sequence
from pathlib import Path

from ...errors import UserError
from ...types import Example
from .epochs import check_limit, shuffled
from .images import ImageReader, as_list, image_path

COLUMNS = {
    "images": ("image", "images", "image_path"),
    "problem": ("problem", "question"),
    "solution": ("solution", "ground_truth"),
}
"""The columns that may hold a field of an example; that of R1-V's training data comes first."""


class LoadedExamples:
    """Examples from rows with the columns `image` or `images`, `problem`, `solution` and
    `thinking`.

    The column `thinking` may be missing. `rows` is a list of dictionaries or a `datasets.Dataset`.
    A row is read, and its images are decoded, only when it is taken. What `take` returns depends on
    the arguments alone. Raises UserError for missing columns at once, and for a bad row or image
    when it is taken.
    """

    def __init__(
        self,
        rows: Sequence,
        source: str,
        seed: int,
        limit: int | None = None,
        image_root: str | Path = ".",
        archive: str | None = None,
        fenced: bool = False,
        allow_urls: bool = False,
    ) -> None:
        """Prepare to read `rows`; `source` names the data in messages.

        A relative image path starts at the folder `image_root`. If the path's first folder is
        called `archive` and `image_root` has no folder of that name, the rest of the path starts
        there. If `fenced`, no path may leave that folder. Images at http(s) addresses are
        downloaded if `allow_urls`.
        """
        check_limit(limit)
        if not len(rows):
            raise UserError(f"{source} is empty: give data with at least one row.")
        self.rows = rows
        self.source = source
        self.seed = seed
        if not isinstance(rows, list):
            # The format "arrow" leaves images encoded, so that a broken one is reported with its
            # row.
            self.rows = rows.with_format("arrow")
        self.images = ImageReader(Path(image_root).expanduser(), fenced, archive, allow_urls)
        self.columns = _find_columns(column_names(rows), source)
        self.size = len(rows) if limit is None else min(limit, len(rows))

    def __len__(self) -> int:
        return self.size

    def take(self, step: int, count: int) -> list[Example]:
        """Return the `count` examples of training step `step`, counted from 0.

        They are shuffled again in every epoch.
        """
        return [self._read(index) for index in shuffled(self.size, self.seed, step * count, count)]

    def all(self, count: int) -> list[Example]:
        """Return the first `count` examples, for evaluation, in the order of the data.

        There may be fewer.
        """
        return [self._read(index) for index in range(min(count, self.size))]

    def require_thinking(self) -> None:
        """Raise UserError unless every row has a worked solution for supervised training."""
        names = column_names(self.rows)
        if "thinking" not in names:
            raise UserError(
                f"{self.source} has no column 'thinking' (found: {', '.join(names)}): add it, for "
                "supervised training imitates it, or imitate the answers alone with "
                "--sft-target answer."
            )
        if isinstance(self.rows, list):
            texts = [row.get("thinking") for row in self.rows]
        else:
            texts = self.rows.select_columns("thinking")[:]["thinking"].to_pylist()
        for index, text in enumerate(texts[: self.size]):
            if not str(text or "").strip():
                raise UserError(
                    f"row {index + 1} of {self.source} has no 'thinking': fill it in or leave the "
                    "row out."
                )

    def _read(self, index: int) -> Example:
        """Make an example of a row."""
        row = self.rows[index] if isinstance(self.rows, list) else self.rows[index].to_pylist()[0]
        name = f"row {index + 1} of {self.source}"
        cells = as_list(row.get(self.columns["images"]))
        paths = [image_path(cell) for cell in cells]
        return Example(
            # Some data marks the image's place in the text; here images always come first.
            problem=self._text(row, "problem", name).replace("<image>", "").strip(),
            images=tuple(self.images.read(cell, name) for cell in cells),
            solution=_inside("answer", self._text(row, "solution", name)),
            thinking=_inside("think", str(row.get("thinking") or "")),
            key=" ".join(path for path in paths if path) or f"row {index + 1}",
        )

    def _text(self, row: dict, field: str, name: str) -> str:
        """Return a field's text; raises UserError, which calls the row `name`, if it is empty."""
        value = row.get(self.columns[field])
        # A column of whole numbers turns into one of fractions if a number is missing.
        if isinstance(value, float) and value.is_integer():
            value = int(value)
        if value is None or not str(value).strip():
            raise UserError(
                f"{name} has no {self.columns[field]!r}: fill it in or leave the row out."
            )
        return str(value).strip()


def column_names(rows: Sequence) -> list[str]:
    """Return the names of all columns of a list of dictionaries or of a `datasets.Dataset`."""
    if isinstance(rows, list):
        return list(dict.fromkeys(name for row in rows for name in row))
    return list(rows.column_names)


def _find_columns(names: list[str], source: str) -> dict[str, str]:
    """Return the column that holds each field of an example."""
    columns = {}
    for field, candidates in COLUMNS.items():
        columns[field] = next((name for name in candidates if name in names), None)
        if columns[field] is None:
            raise UserError(
                f"{source} has no column {' or '.join(map(repr, candidates))} "
                f"(found: {', '.join(names)}): rename the column that holds the {field}."
            )
    return columns


def _inside(tag: str, text: str) -> str:
    """Return the text inside a tag, or all of it without one: `<answer> 3 </answer>` gives `3`."""
    found = re.search(rf"<{tag}>(.*?)</{tag}>", text, re.DOTALL)
    return (found[1] if found else text).strip()
