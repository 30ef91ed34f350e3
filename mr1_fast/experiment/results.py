"""What an experiment has recorded so far, read back from its folder."""

import json
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError
from ..evaluate.held_out import MODES
from ..report.page import json_object, read_metrics
from .statistics import Runs

BASE = "base"
_BITS = re.compile(r"[01]+")


@dataclass
class CellResult:
    """A trained model or a base model (`trained` is None), finished or not."""

    folder: Path
    variant: str
    trained: str | None
    seed: int
    correct: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    """Task → mode → right or wrong of each test item; empty until the cell is finished."""
    error: str = ""
    """Why it failed, if it did."""
    seconds: dict[str, float] = field(default_factory=dict)
    """Of training and evaluation."""
    peak_memory: float | None = None
    """Bytes, where measured."""

    @property
    def state(self) -> str:
        """Finished, failed or missing."""
        return "finished" if self.correct else "failed" if self.error else "missing"

    def curve(self) -> dict[str, np.ndarray]:
        """Accuracy on validation items by task over steps; `step` is always there."""
        return read_metrics(self.folder / "curve.jsonl")

    def metrics(self) -> dict[str, np.ndarray]:
        """The metrics of training over steps; `step` is always there."""
        return read_metrics(self.folder / "run" / "metrics.jsonl")

    def samples(self) -> list[dict]:
        """Some test items with the model's greedy answers; none before its evaluation."""
        path = self.folder / "samples.json"
        samples = _read(path) if path.exists() else []
        if not isinstance(samples, list) or not all(isinstance(sample, dict) for sample in samples):
            raise UserError(f"{path} holds no list of samples: remove it.")
        return samples


@dataclass
class Results:
    """An experiment with its cells."""

    output: Path
    about: dict[str, Any]
    """experiment.json."""
    cells: list[CellResult]

    @property
    def methods(self) -> list[str]:
        """The variants that are trained."""
        return [variant["name"] for variant in self.about["variants"] if variant["name"] != BASE]

    @property
    def tasks(self) -> list[str]:
        """The tasks that are tested."""
        return list(self.about["tasks"])

    def label(self, variant: str) -> str:
        """How a variant is called."""
        labels = {each["name"]: each.get("label") for each in self.about["variants"]}
        return str(labels.get(variant) or variant)

    def pairs(self, same: bool) -> list[tuple[str, str]]:
        """(trained on, tested on) of the same task, or of two tasks."""
        return [
            (task, other)
            for task in self.about["trained"]
            for other in self.tasks
            if (task == other) == same
        ]

    def of(self, variant: str, trained: str) -> list[CellResult]:
        """The cells of a variant, one a seed; of the base model whatever task is named."""
        return [
            cell
            for cell in self.cells
            if cell.variant == variant and cell.trained in (None, trained)
        ]

    def runs(self, variant: str, pair: tuple[str, str], mode: str) -> dict[int, np.ndarray]:
        """Right or wrong of each test item by seed, of the finished cells of a (trained on, tested on) pair."""
        trained, tested = pair
        return {
            cell.seed: cell.correct[tested][mode]
            for cell in self.of(variant, trained)
            if cell.correct
        }


def cell_folder(output: Path, variant: str, trained: str | None, seed: int) -> Path:
    """Where a cell writes."""
    return output.joinpath("cells", variant, *filter(None, [trained]), f"seed{seed}")


def common(*runs: dict[int, np.ndarray]) -> list[Runs]:
    """Each of several variants' runs for the seeds that all of them have."""
    seeds = sorted(set.intersection(*(set(each) for each in runs)))
    return [[each[seed] for seed in seeds] for each in runs]


def read_results(output: Path) -> Results:
    """Read experiment.json and each cell's files; UserError names what is damaged, or a folder that is none."""
    path = output / "experiment.json"
    if not path.exists():
        raise UserError(f"{path} does not exist: name the folder of an experiment.")
    about = json_object(path.read_text(encoding="utf-8", errors="replace"), path)
    results, seeds = Results(output, about, []), about.get("seeds")
    try:
        items = {task: about["tasks"][task]["items"] for task in results.tasks}
        names = [
            (BASE, None),
            *((method, task) for task in about["trained"] for method in results.methods),
        ]
        if not all(about[name] for name in ("preset", "model", "axis", "seeds")):
            raise ValueError("a value is empty")
    except (KeyError, TypeError, ValueError) as error:
        raise UserError(f"{path} is damaged ({error}): restore it.") from error
    results.cells = [
        _read_cell(output, variant, task, seed, items) for variant, task in names for seed in seeds
    ]
    return results


def _read_cell(
    output: Path, variant: str, trained: str | None, seed: int, items: dict[str, int]
) -> CellResult:
    cell = CellResult(cell_folder(output, variant, trained, seed), variant, trained, seed)
    finished, failed = cell.folder / "cell.json", cell.folder / "failed.json"
    if finished.exists():
        try:
            record = _read(finished)
            cell.seconds = {name: float(record["seconds"][name]) for name in ("train", "evaluate")}
            cell.peak_memory = record["peak_memory"] and float(record["peak_memory"])
            cell.correct = {
                task: _modes(record["correct"][task], count) for task, count in items.items()
            }
        except (KeyError, TypeError, ValueError) as error:
            raise UserError(
                f"{finished} is damaged ({error}): remove it, and run the cell again."
            ) from error
    elif failed.exists():
        cell.error = str(
            json_object(failed.read_text(encoding="utf-8", errors="replace"), failed).get(
                "error", "?"
            )
        )
    return cell


def _read(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON: remove it, and run the cell again.") from error


def _modes(modes: dict[str, str], count: int) -> dict[str, np.ndarray]:
    for mode in MODES:
        if not _BITS.fullmatch(modes[mode]) or len(modes[mode]) != count:
            raise ValueError(f"{mode} answers are not {count} times 0 or 1")
    return {mode: np.frombuffer(modes[mode].encode(), dtype=np.uint8) == ord("1") for mode in MODES}
