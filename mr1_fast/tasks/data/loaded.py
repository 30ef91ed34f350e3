"""Examples made of rows of data."""

import os
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

from ...errors import UserError, shortened
from ...types import Example
from .digests import digest_of
from .epochs import check_limit, shuffled
from .images import ImageReader, image_path
from .layouts import (
    COLUMNS,
    Fields,
    check_columns,
    found_names,
    holds_images,
    looks_like_images,
    one_of,
    read_fields,
)
from .options import DEFAULTS, DataOptions
from .table import Table

SAMPLE = 256
"""Rows, evenly spread, by which `fingerprint` tells data apart."""


class LoadedExamples:
    """Examples from rows in one of the layouts of `layouts.py`.

    A row is read, and its images are decoded, only when it is taken. What `take` and `take_more`
    return depends on the arguments alone. Raises UserError for missing columns at once, and for a
    bad row or image when it is read. Rows may be read from several threads at once.
    """

    def __init__(
        self,
        rows: Sequence,
        source: str,
        seed: int,
        limit: int | None = None,
        image_root: str | Path = ".",
        archive: str | None = None,
        options: DataOptions = DEFAULTS,
        fenced: bool = False,
    ) -> None:
        """Prepare to read `rows`, a list of dictionaries or a `datasets.Dataset`.

        `source` names the data in messages. A relative image path starts at the folder
        `image_root`, which no path may leave if it is `fenced`. If the path's first folder is
        called `archive` and `image_root` has no folder of that name, the rest of the path starts
        there.
        """
        check_limit(limit)
        if not len(rows):
            raise UserError(f"{source} is empty: give data with at least one row.")
        self.source = source
        self.seed = seed
        self._images = ImageReader(
            Path(os.path.expanduser(image_root)), fenced, archive, options.allow_urls
        )
        self._limit = len(rows) if limit is None else limit
        self._table = Table(rows)
        self._kept: Sequence[int] = range(len(rows))
        self._columns = check_columns(self._table.names, options.columns, source, options.lenient)
        self._check_images()

    def __len__(self) -> int:
        return min(self._limit, len(self._kept))

    @property
    def indices(self) -> Sequence[int]:
        """The numbers of all rows that are not left out, counted from 0, in their order.

        Examples are taken from the first of them.
        """
        return self._kept

    def take(self, step: int, count: int) -> list[Example]:
        """Return the `count` examples of training step `step`, counted from 0.

        They are shuffled again in every epoch.
        """
        order = shuffled(len(self), self.seed, step * count, count)
        return [self.read(self._kept[entry]) for entry in order]

    def take_more(self, start: int, count: int) -> list[Example]:
        """Return entries `start` … `start + count − 1` of an endless list apart from the steps'.

        It has the same examples in another order.
        """
        order = shuffled(len(self), f"{self.seed} more", start, count)
        return [self.read(self._kept[entry]) for entry in order]

    def all(self, count: int) -> list[Example]:
        """Return the first `count` examples, for evaluation, in the order of the data.

        There may be fewer.
        """
        return [self.read(index) for index in self._kept[: min(count, len(self))]]

    def leave_out(self, indices: Iterable[int]) -> None:
        """Take no examples from the rows of these numbers, counted from 0, from now on."""
        left_out = set(indices)
        self._kept = [index for index in self._kept if index not in left_out]

    def read(self, index: int) -> Example:
        """Return the example of the row `index`, counted from 0, whether or not it is left out.

        Raises UserError, which names the row, if it is not understood or an image cannot be read.
        """
        name = self._name(index)
        fields = self._fields(index)
        return Example(
            problem=fields.problem,
            images=self._images.read_all(fields.images, name),
            solution=fields.solution,
            thinking=fields.thinking,
            key=" ".join(filter(None, map(image_path, fields.images))) or f"row {index + 1}",
            source=name,
            extra=fields.extra,
        )

    def digest(self, index: int) -> str:
        """Return what identifies the content of a row: its cells, and its image files as they are.

        Of a file, that is its place, its size and when it was last changed.
        """
        try:
            images = self._fields(index).images
        except UserError:
            images = []
        with _named(self._name(index)):
            return digest_of(self._table.row(index), *map(self._images.stamp, images))

    def fingerprint(self) -> str:
        """Return what tells these data from others: how many rows, and the texts of some of them.

        Images are not among it: machines may have them in other places.
        """
        count = len(self._kept)
        digest = digest_of([self._text(index) for index in self._kept[:: -(-count // SAMPLE)]])
        return f"{count} rows ({digest})"

    def _text(self, index: int) -> tuple[str, ...]:
        """Return problem and solution of a row; nothing of one that is not understood."""
        try:
            fields = self._fields(index)
        except UserError:
            return ()
        return fields.problem, fields.solution

    def _fields(self, index: int) -> Fields:
        """Return what a row says; raises UserError, which names it, where it is not understood."""
        name = self._name(index)
        with _named(name):
            return read_fields(self._table.row(index), self._columns, name)

    def require_thinking(self) -> None:
        """Raise UserError if no row seems to have a worked solution for supervised training.

        That is if there is no column for it, and none in the solution of the first row.
        """
        names = self._table.names
        if "thinking" in self._columns or "thinking" in names:
            return
        index = self._kept[0]
        try:
            thinking = self._fields(index).thinking
        except UserError:  # which the check of all rows reports
            return
        if not thinking:
            raise UserError(
                f"{self.source} has no column 'thinking' {found_names(names)}: add it, "
                "for supervised training imitates it, or imitate the answers alone with "
                "--sft-target answer."
            )

    def _check_images(self) -> None:
        """Raise UserError where the images are in a column that is not recognised."""
        names = self._table.names
        if "images" in self._columns or any(map(holds_images, names)):
            return
        try:
            with _named(self._name(0)):
                first = self._table.row(0)
        except UserError:  # which the check of all rows reports
            return
        for column, value in first.items():
            if looks_like_images(value):
                raise UserError(
                    f"{self.source} has no column {one_of(COLUMNS['images'])} "
                    f"{found_names(names)}, but {column!r} looks like images: name it as in "
                    f"""--columns '{{"images": "{column}"}}', or leave it out."""
                )

    def _name(self, index: int) -> str:
        """Return what messages call a row."""
        return f"row {index + 1} of {self.source}"


@contextmanager
def _named(row: str) -> Iterator[None]:
    """Turn whatever reading a row raises into a UserError that names it.

    Numbers, dates, texts and nesting of any size have their own ways to fail.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        reason = shortened(f"{type(error).__name__}: {error}", 120)
        raise UserError(f"{row} cannot be read ({reason}): correct it or leave it out.") from error
