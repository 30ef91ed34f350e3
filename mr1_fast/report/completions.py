"""The page of a run's completions, which a reader can search and filter: completions.html.

A run of 5,000 steps with 16 prompts of 8 completions has 640,000 of them, and its
completions.jsonl is larger than memory may be. The page shows at most MOST_COMPLETIONS in about
MOST_BYTES: half of either is for the newest, without a gap, and half for prompts that are evenly
spaced over all that came before. The file is read in blocks to find where its lines begin, and then
only the lines that are shown.
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from ..errors import UserError
from ..files import write_text
from .page import data_block, html_page, printable, text
from .records import json_object
from .sections import about

RECORDS, PAGE = "completions.jsonl", "completions.html"
"""What is read and what is written, in a run's folder."""
MOST_COMPLETIONS = 10_000
"""The most completions of a page."""
MOST_BYTES = 8_000_000
"""The most bytes of a page's completions, as JSON."""
LONGEST = 4000
"""The most characters of a problem or a completion that are shown."""
LIVE_BYTES = 256 * 2**20
"""The largest completions.jsonl that is read again and again while a run goes on: 256 MiB."""
BLOCK = 2**20
"""Bytes that are read at once to find the lines."""

_OWN = {"text", "reward", "why", "reason"}
"""What the record of a completion has besides the values of its rewards."""

_FILTERS = """<div class="card filters" id="filters" hidden>
<label class="search">Search<input type="search" id="search" autocomplete="off"
 placeholder="in problem, answer, completion, verdict"></label>
<div><label for="from">Steps</label><div class="range">
<input id="from" inputmode="numeric" placeholder="from" aria-label="first step">
<input id="to" inputmode="numeric" placeholder="to" aria-label="last step"></div></div>
<div><label for="low">Reward</label><div class="range">
<input id="low" inputmode="decimal" placeholder="min" aria-label="lowest reward">
<input id="high" inputmode="decimal" placeholder="max" aria-label="highest reward"></div></div>
<label>Verdict<select id="verdict"><option value="">all</option><option>right</option>
<option>wrong</option></select></label>
<label>Ended by<select id="ended"><option value="">all</option><option>eos</option>
<option>stop</option><option>length</option></select></label>
<label>Order<select id="order"><option value="newest">newest first</option>
<option value="oldest">oldest first</option><option value="best">highest reward</option>
<option value="worst">lowest reward</option></select></label>
</div>
<p class="soft" id="count" aria-live="polite"></p>
<div class="stack" id="list"></div><button class="more" id="more" hidden></button>
<noscript><p>Searching needs JavaScript, which this browser has switched off.</p></noscript>"""


@dataclass
class Selection:
    """The prompts that a page shows, with their completions."""

    groups: list[dict]
    """Prompts in the order of the file, in the form that the page's script reads."""
    newest: int
    """How many of the last groups leave no gap between them."""
    total: int
    """Completions in the whole file; estimated if prompts have different numbers of them."""

    @property
    def shown(self) -> int:
        """How many completions are shown."""
        return sum(len(group["completions"]) for group in self.groups)

    def describe(self) -> str:
        """Say how many of how many completions are shown, and which."""
        if self.shown >= self.total:
            return f"All {self.total:,} completions."
        newest = self.groups[-self.newest :]
        count = sum(len(group["completions"]) for group in newest)
        earlier = f" and an even sample of {self.shown - count:,} earlier ones"
        return (
            f"{self.shown:,} of {self.total:,} completions: the newest {count:,}, from step "
            f"{newest[0]['step']} to {newest[-1]['step']},{earlier if self.shown > count else ''}."
        )


def write_completions(run: Path, config: dict) -> Path:
    """Write `run`/completions.html from completions.jsonl; returns its path.

    Raises UserError for a damaged line among those that are shown, and where the page cannot be
    written.
    """
    chosen = select(run / RECORDS)
    page = html_page(
        model=text(config.get("model")),
        about=about(config),
        headline="Completions",
        progress=f'{chosen.describe()} <a href="report.html">Report of the run</a>',
        sections=_FILTERS + data_block(chosen.groups),
        script=Path(__file__).with_name("completions.js").read_text(encoding="utf-8"),
    )
    write_text(run / PAGE, page, "check the folder and its disk")
    return run / PAGE


def select(path: Path) -> Selection:
    """Choose what a page shows of a file of completions; see the top of this file.

    Raises UserError for a damaged line among the chosen ones.
    """
    with path.open("rb") as file:
        starts = _line_starts(file)
        count = len(starts) - 1
        room, newest = _Room(), []
        while len(newest) < count:
            group = _read(file, starts, count - 1 - len(newest), path)
            if not room.takes(group) and newest:
                break
            newest.append(group)
        newest.reverse()

        each = max(1, round(sum(len(g["completions"]) for g in newest) / max(1, len(newest))))
        earlier = count - len(newest)
        wanted = min(earlier, MOST_COMPLETIONS // 2 // each)
        chosen = np.unique(np.linspace(0, earlier - 1, wanted).round().astype(int))
        sample = [_read(file, starts, int(index), path) for index in chosen]
    while sum(map(_size, sample)) > MOST_BYTES // 2:
        sample = sample[1::2]

    groups = [*sample, *newest]
    shown = sum(len(group["completions"]) for group in groups)
    total = shown if len(groups) == count else round(count * shown / max(1, len(groups)))
    return Selection(groups, len(newest), total)


class _Room:
    """What is left of the newest completions' half of a page."""

    def __init__(self) -> None:
        self.completions, self.bytes = MOST_COMPLETIONS // 2, MOST_BYTES // 2

    def takes(self, group: dict) -> bool:
        """Whether there is room for a group, which then takes it."""
        self.completions -= len(group["completions"])
        self.bytes -= _size(group)
        return self.completions >= 0 and self.bytes >= 0


def _size(group: dict) -> int:
    """The bytes of a group in the page."""
    return len(data_block(group).encode())


def _line_starts(file: BinaryIO) -> np.ndarray:
    """Where the whole lines of a file begin, and where the last of them ends: (lines + 1,) int64.

    A line without its end is being written at this moment, or the run was killed at it.
    """
    found, position = [np.zeros(1, dtype=np.int64)], 0
    while block := file.read(BLOCK):
        ends = np.flatnonzero(np.frombuffer(block, dtype=np.uint8) == ord("\n"))
        found.append(position + 1 + ends.astype(np.int64))
        position += len(block)
    return np.concatenate(found)


def _read(file: BinaryIO, starts: np.ndarray, index: int, path: Path) -> dict:
    """The group in line `index`, cut to what is shown; UserError if there is none."""
    file.seek(starts[index])
    where = f"{path} line {index + 1}"
    record = json_object(file.read(starts[index + 1] - starts[index]), where)
    completions = record.get("completions")
    if not isinstance(completions, list) or not all(isinstance(c, dict) for c in completions):
        raise UserError(f"{where} has no completions: remove it.")
    return {
        "step": _finite(record.get("step")),
        "problem": _cut(record.get("problem", "")),
        "solution": _cut(record.get("solution", "")),
        "completions": [_completion(each) for each in completions],
    }


def _completion(record: dict) -> dict:
    parts = {
        printable(name, 200)[0]: _finite(value)
        for name, value in record.items()
        if name not in _OWN
    }
    return {
        "text": _cut(record.get("text", "")),
        "reward": _finite(record.get("reward")),
        "why": _cut(record.get("why", "")),
        "reason": printable(record.get("reason", ""), 20)[0],
        "parts": parts,
    }


def _cut(value: object) -> str:
    return "".join(printable(value, LONGEST))


def _finite(value: object) -> float | None:
    """A number that JSON can hold; None otherwise, and for a reward that says nothing."""
    known = isinstance(value, int | float) and math.isfinite(value)
    return value if known else None
