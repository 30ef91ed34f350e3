"""Checking every row of loaded data before the first step, so that a bad one costs no hours.

Rows are read and checked in parallel. What was found good is remembered by the content of the row
and the size and time of its image files, so that the next run with the same settings checks only
what has changed.
"""

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

from tqdm import tqdm

from ...errors import UserError
from ...files import write_text
from ...torchrun import is_first
from ...types import Example
from .loaded import LoadedExamples

SHOWN = 2
"""How many faults a message shows; of more it shows the first, and a file has all of them."""
LONGEST = 400
"""The most characters of the faults that a message shows."""
BATCH = 512
"""Rows that are checked before their results are looked at."""


@dataclass(frozen=True)
class BadRow:
    """A row that cannot be used."""

    index: int
    fault: str
    """The sentence that names the row, the fault and the way out."""


@dataclass(frozen=True)
class RowMemory:
    """The digests of rows that were found good, in a file of the cache."""

    path: Path

    def read(self) -> set[str]:
        """Return the digests; none if the file is missing or damaged."""
        try:
            return set(self.path.read_text(encoding="ascii").split())
        except (OSError, ValueError):
            return set()

    def add(self, digests: set[str]) -> None:
        """Add digests to the file; a cache that cannot be written is no reason to stop."""
        try:
            write_text(self.path, "\n".join(sorted(self.read() | digests)) + "\n")
        except UserError:
            return


def check_rows(
    source: LoadedExamples,
    check: Callable[[Example], None],
    memory: RowMemory,
    count: int | None = None,
) -> list[BadRow]:
    """Check the rows of `source` in order until `count` good ones are found, or all of them.

    `check` raises UserError for an example that cannot be used; it is called from several threads.
    Returns the bad rows. A bar is shown if it takes longer than a second.
    """
    known, good, bad = memory.read(), set(), []

    def look(index: int) -> tuple[int, str, str | None]:
        digest = ""
        try:
            digest = source.digest(index)
            if digest not in known:
                check(source.read(index))
        except UserError as error:
            return index, digest, str(error)
        return index, digest, None

    wanted = len(source) if count is None else min(count, len(source))
    found = 0
    indices = iter(source.indices)
    with (
        ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as pool,
        tqdm(
            total=wanted,
            desc=f"checking rows of {source.source}",
            unit="row",
            delay=1,
            disable=not is_first(),
        ) as bar,
    ):
        while found < wanted and (batch := list(islice(indices, min(BATCH, wanted - found)))):
            for index, digest, fault in pool.map(look, batch):
                bar.update()
                if fault is None:
                    good.add(digest)
                    found += 1
                else:
                    bad.append(BadRow(index, fault))
    if not good <= known:
        memory.add(good)
    return bad


def settle_bad_rows(
    source: LoadedExamples,
    bad: list[BadRow],
    skip: bool,
    report: Path,
    say: Callable[[str], None],
) -> None:
    """Leave bad rows out if `skip`, and say so; otherwise raise UserError.

    All faults are written to the file `report` where a message does not show them all.
    """
    if not bad:
        return
    faults = [row.fault for row in bad]
    shown = " ".join(faults)
    if len(bad) > SHOWN or len(shown) > LONGEST:
        write_text(report, "\n".join(faults) + "\n")
        more = f" All are in {report}." if len(bad) > 1 else ""
        shown = f"{_cut(faults[0])}{more}"
    rows = "row" if len(bad) == 1 else "rows"
    if not skip:
        raise UserError(
            f"{len(bad)} {rows} of {source.source} cannot be used: {shown} Mend the data, or leave "
            "such rows out with --bad-rows skip."
        )
    source.leave_out(row.index for row in bad)
    if not len(source):
        raise UserError(f"no row of {source.source} can be used: {shown}")
    say(f"left out {len(bad)} {rows} of {source.source}: {shown}")


def _cut(fault: str) -> str:
    """Return a fault; of a long one the beginning and the end, where the way out is."""
    if len(fault) <= LONGEST:
        return fault
    return f"{fault[: LONGEST - 120]} … {fault[-100:]}"
