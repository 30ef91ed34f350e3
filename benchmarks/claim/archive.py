"""The archive: all finished cells of several experiments in one small JSON file.

It holds counts of right answers, learning curves and a few points of the metrics, a cell a line.
What it holds outlives the folders of the experiments.
"""

import json
import shlex
from collections.abc import Iterable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from mr1_fast.errors import UserError, shortened
from mr1_fast.experiment.results import CellResult, Results, read_results
from mr1_fast.files import write_text

CELLS = Path("docs/experiment/cells.json")
"""The archive of the repository."""

METRICS = (
    *("reward", "accuracy", "kl", "beta", "entropy"),
    *("kl_pull", "reward_pull", "completion_length"),
)
"""The metrics of training that are kept, where a cell has them."""
OPTIONAL = ("form", "curve")
"""What a written cell leaves out where it is empty."""
POINTS = 25
"""The most points of a metric: longer runs are averaged in blocks of steps."""

Name = tuple[str, str | None, int]
"""Variant, task that is trained, and seed: the name of a cell in its experiment."""
Column = list[float | None]
"""A metric over blocks of steps, or an accuracy over steps; None where there is no number."""


@dataclass(frozen=True)
class Record:
    """A finished cell."""

    variant: str
    trained: str | None
    """The task that it is trained on; None for the base model."""
    seed: int
    seconds: dict[str, float]
    """The time of training ("train") and of the test ("evaluate")."""
    right: dict[str, dict[str, int]]
    """Task → mode → number of test items that are answered right."""
    curve: dict[str, list[float]] = field(default_factory=dict)
    """`step`, and the greedy accuracy on validation items of each task."""
    every: int = 1
    """The steps of a block of the metrics."""
    metrics: dict[str, Column] = field(default_factory=dict)
    """Metric → its means over blocks of steps."""
    form: dict[str, dict[str, int]] = field(default_factory=dict)
    """Task → of its greedy answers, how many open `<think>` ("reasoned"), and how many hold an
    answer that R1-V's rule reads ("answered"); empty where the answers are not at hand."""

    @property
    def name(self) -> Name:
        """What it is called in its experiment."""
        return self.variant, self.trained, self.seed

    def same_results(self, other: "Record") -> bool:
        """Return whether both have the same answers and the same learning curve."""
        return (self.right, self.curve) == (other.right, other.curve)


@dataclass
class Archived:
    """The finished cells of a preset, and how they were made."""

    model: str
    items: dict[str, int]
    """Task → number of test items."""
    settings: dict[str, Any]
    """The settings that all cells share."""
    variants: dict[str, Any]
    """Variant → the settings that make it."""
    commands: list[str] = field(default_factory=list)
    dates: list[str] = field(default_factory=list)
    hardware: list[str] = field(default_factory=list)
    versions: list[str] = field(default_factory=list)
    cells: list[Record] = field(default_factory=list)

    def by_name(self) -> dict[Name, Record]:
        """Name → cell."""
        return {cell.name: cell for cell in self.cells}

    def of(self, variant: str, trained: str | None) -> dict[int, Record]:
        """Seed → cell of a variant that is trained on a task."""
        return {
            cell.seed: cell
            for cell in self.cells
            if (cell.variant, cell.trained) == (variant, trained)
        }


Archive = dict[str, Archived]
"""Preset → its finished cells."""


def read_archive(path: Path) -> Archive:
    """The archive in `path`; UserError where there is none, or where it is damaged."""
    if not path.exists():
        raise UserError(
            f"{path} does not exist: make it with `python -m benchmarks.claim collect`."
        )
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
        found = {}
        for preset, about in content.items():
            cells = [Record(**cell) for cell in about.pop("cells")]
            found[preset] = Archived(**about, cells=cells)
        return found
    except (ValueError, TypeError, KeyError, AttributeError, OSError) as error:
        raise UserError(f"{path} is damaged ({shortened(error)}): restore it.") from error


def write_archive(path: Path, archive: Archive) -> None:
    """Write the archive: sorted, a cell a line, so that a change of one cell is one line."""
    content = {preset: _sorted(archive[preset]) for preset in sorted(archive)}
    write_text(path, _lines(content, depth=3) + "\n", "choose another with --cells")


def _sorted(found: Archived) -> dict[str, Any]:
    order = sorted(found.cells, key=lambda cell: (cell.trained or "", cell.variant, cell.seed))
    about = asdict(found) | {"cells": [_without_empty(cell) for cell in order]}
    return about | {"variants": dict(sorted(found.variants.items()))}


def _without_empty(cell: Record) -> dict[str, Any]:
    written = asdict(cell)
    if not cell.metrics:
        del written["every"], written["metrics"]
    return {name: value for name, value in written.items() if value or name not in OPTIONAL}


def _lines(value: Any, depth: int, indent: str = "") -> str:
    """JSON whose containers have a line for each entry, down to `depth`, and are compact below."""
    if not depth or not value or not isinstance(value, dict | list):
        return json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    inner, deeper = indent + " ", depth - 1
    if isinstance(value, dict):
        entries = [f"{json.dumps(k)}: {_lines(v, deeper, inner)}" for k, v in value.items()]
        left, right = "{}"
    else:
        entries = [_lines(each, deeper, inner) for each in value]
        left, right = "[]"
    body = ",\n".join(inner + entry for entry in entries)
    return f"{left}\n{body}\n{indent}{right}"


def collect(archive: Archive, folder: Path, replace: bool = False) -> str:
    """Merge the finished cells of the experiment in `folder` into the archive.

    Returns a line that says what was new. A cell that the archive has with other results, and an
    experiment with other settings, are a UserError unless they are to `replace` what is there.
    Cells of a seed that begin from several models always are one.
    """
    results = read_results(folder)
    preset, found = results.about["preset"], _described(results)
    known = archive.setdefault(preset, _described(results))
    if changed := _differences(known, found):
        if not replace:
            raise UserError(
                f"{folder} has another {', '.join(changed)} than the cells of {preset} that were "
                "collected before: collect it into another file with --cells, or give --replace "
                "to drop those cells."
            )
        known = archive[preset] = found
    for name in ("commands", "dates", "hardware", "versions"):
        setattr(known, name, sorted({*getattr(known, name), *getattr(found, name)}))
    known.variants |= found.variants

    cells, finished = known.by_name(), [cell for cell in results.cells if cell.correct]
    before = len(cells)
    for record in map(record_of, finished):
        earlier = cells.get(record.name)
        if earlier and not earlier.same_results(record) and not replace:
            named = " · ".join(map(str, filter(lambda part: part is not None, record.name)))
            raise UserError(
                f"{folder} has other results of the cell {named} than those that were collected "
                "before: find out why, and give --replace for the new ones."
            )
        cells[record.name] = record
    if seeds := _with_several_starts(cells.values()):
        raise UserError(
            f"{folder} has cells of seed {', '.join(map(str, seeds))} that begin from another "
            "model than those that were collected before, so they are no pairs: collect it into "
            "another file with --cells."
        )
    known.cells = list(cells.values())
    return (
        f"{preset}: {len(finished)} of {len(results.cells)} cells of {folder} are finished, "
        f"{len(cells) - before} of them new"
    )


def _with_several_starts(cells: Iterable[Record]) -> list[int]:
    """The seeds whose learning curves do not all begin at the same point."""
    starts: dict[int, set[tuple]] = {}
    for cell in cells:
        first = tuple((task, values[0]) for task, values in sorted(cell.curve.items()))
        if first and cell.curve["step"][0] == 0:
            starts.setdefault(cell.seed, set()).add(first)
    return sorted(seed for seed, found in starts.items() if len(found) > 1)


def _described(results: Results) -> Archived:
    about = results.about
    settings = {k: v for k, v in about["settings"].items() if k != "variants"}
    made = about["settings"].get("variants", {})
    return Archived(
        model=about["model"],
        items={task: about["tasks"][task]["items"] for task in results.tasks},
        settings=settings,
        variants={variant: made.get(variant, {}) for variant in results.methods},
        commands=[_command(line) for line in about["command"].splitlines()],
        dates=about["date"].split("; "),
        hardware=about["hardware"].split("; "),
        versions=[", ".join(f"{name} {version}" for name, version in about["versions"].items())],
    )


def _command(command: str) -> str:
    """The command without the folder that it wrote into, which says nothing about its cells."""
    words, kept = iter(shlex.split(command)), []
    for word in words:
        if word == "--output":
            next(words, None)
        elif not word.startswith("--output="):
            kept.append(word)
    return shlex.join(kept)


def _differences(known: Archived, found: Archived) -> list[str]:
    """The names of what two descriptions of a preset disagree about."""
    changed = [name for name in ("model", "items") if getattr(known, name) != getattr(found, name)]
    settings = [(known.settings, found.settings, known.settings | found.settings)]
    settings += [(known.variants, found.variants, known.variants.keys() & found.variants.keys())]
    for ours, theirs, names in settings:
        changed += [name for name in names if ours.get(name) != theirs.get(name)]
    return sorted(changed)


def record_of(cell: CellResult) -> Record:
    """What the archive keeps of a finished cell."""
    curve, metrics = cell.curve(), cell.metrics()
    right = {
        task: {mode: int(answers.sum()) for mode, answers in modes.items()}
        for task, modes in cell.correct.items()
    }
    every = max(1, -(-len(metrics["step"]) // POINTS))
    kept = {name: block_means(metrics[name], every) for name in METRICS if name in metrics}
    points = {name: _rounded(values, 4) for name, values in curve.items() if len(values)}
    if points:
        points["step"] = [int(step) for step in curve["step"]]
    seconds = {name: round(value, 1) for name, value in cell.seconds.items()}
    form = {task: found for task in right if (found := _form(cell.folder / f"{task}-greedy.json"))}
    return Record(cell.variant, cell.trained, cell.seed, seconds, right, points, every, kept, form)


def _form(path: Path) -> dict[str, int]:
    """What kind of text the answers in a file of R1-V's layout are; empty without the file."""
    if not path.exists():
        return {}
    answers = json.loads(path.read_text(encoding="utf-8"))["results"]
    return {
        "reasoned": sum("<think>" in answer["model_output"] for answer in answers),
        "answered": sum(answer["extracted_answer"] is not None for answer in answers),
    }


def block_means(values: np.ndarray, every: int) -> Column:
    """The means of every `every` values, to three digits; None for a block without a number."""
    blocks = [values[at : at + every] for at in range(0, len(values), every)]
    return _rounded([_finite_mean(block) for block in blocks], 3)


def _finite_mean(block: np.ndarray) -> float:
    finite = block[np.isfinite(block)]
    return float(finite.mean()) if len(finite) else np.nan


def _rounded(values: Iterable[float], digits: int) -> Column:
    return [float(f"{value:.{digits}g}") if np.isfinite(value) else None for value in values]
