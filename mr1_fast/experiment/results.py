"""What an experiment has recorded so far, read back from its folder."""

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ..errors import UserError, shortened
from ..evaluate.held_out import MODES
from ..evaluate.judges import NAMES
from ..integrity import files_finding, read_sealed
from ..report.records import read_json_object, read_metrics
from .statistics import Runs

BASE = "base"
"""The name of the variant that is not trained."""

DESCRIBED = {
    *("preset", "command", "date", "hardware", "versions", "model", "paper", "tasks", "axis"),
    *("variants", "trained", "seeds", "test_items", "settings", "notes"),
}
"""The entries of experiment.json, which had no checksum in earlier versions."""
RECORDED = {"variant", "trained", "seed", "seconds", "steps", "peak_memory", "correct"}
"""The entries of cell.json in earlier versions, where it named no files and had no checksum."""

_BITS = re.compile(r"[01]+")


@dataclass
class CellResult:
    """What is known of one cell, finished or not."""

    folder: Path
    variant: str
    trained: str | None
    """The task that it is trained on; None for the base model."""
    seed: int
    correct: dict[str, dict[str, np.ndarray]] = field(default_factory=dict)
    """Task → mode → bools of shape (items,): whether each test item is answered right.

    By the judge of training. Empty until the cell is finished."""
    other_judges: dict[str, dict[str, dict[str, np.ndarray]]] = field(default_factory=dict)
    """Another judge → its verdicts on the same answers, for the tasks that have such a judge."""
    error: str = ""
    """The reason if the cell has failed."""
    seconds: dict[str, float] = field(default_factory=dict)
    """The time of training ("train") and of the test ("evaluate"), once the cell is finished."""
    peak_memory: float | None = None
    """Peak of allocated memory in bytes, where it was measured."""

    @property
    def state(self) -> str:
        """finished, failed or missing."""
        return "finished" if self.correct else "failed" if self.error else "missing"

    def curve(self) -> dict[str, np.ndarray]:
        """Accuracy on validation items: task → array over steps, with the steps as `step`."""
        return read_metrics(self.folder / "curve.jsonl")

    def metrics(self) -> dict[str, np.ndarray]:
        """The metrics of training: name → array over steps, with the steps as `step`."""
        return read_metrics(self.folder / "run" / "metrics.jsonl")

    def samples(self) -> list[dict]:
        """Some test items with the model's greedy answers; empty before the cell is tested."""
        path = self.folder / "samples.json"
        samples = _read_json(path) if path.exists() else []
        if not isinstance(samples, list) or not all(isinstance(sample, dict) for sample in samples):
            raise UserError(f"{path} holds no list of samples: remove it.")
        return samples


@dataclass
class Results:
    """An experiment and all its cells."""

    output: Path
    """The folder of the experiment."""
    about: dict[str, Any]
    """The content of experiment.json."""
    cells: list[CellResult]

    @property
    def methods(self) -> list[str]:
        """The names of the variants that are trained."""
        return [variant["name"] for variant in self.about["variants"] if variant["name"] != BASE]

    def trained_on(self, variant: str) -> list[str]:
        """The tasks that a variant is trained on; earlier versions trained each on all."""
        entry = next(each for each in self.about["variants"] if each["name"] == variant)
        return list(entry.get("trained", self.about["trained"]))

    @property
    def judge(self) -> str:
        """The judge of training, by which an experiment counts unless another one is named."""
        return str(self.about.get("judge", "strict"))

    def judges(self, task: str) -> list[str]:
        """The judges of a task's answers: that of training alone, for tasks that are drawn."""
        found = {
            name
            for cell in self.cells
            for name in cell.other_judges
            if task in cell.other_judges[name]
        }
        return [name for name in NAMES if name in found | {self.judge}]

    @property
    def tasks(self) -> list[str]:
        """The tasks that the cells are tested on."""
        return list(self.about["tasks"])

    def label(self, variant: str) -> str:
        """What the report calls a variant."""
        labels = {each["name"]: each.get("label") for each in self.about["variants"]}
        return str(labels.get(variant) or variant)

    def pairs(self, same: bool) -> list[tuple[str, str]]:
        """All (trained on, tested on) of the same task, or else of two different tasks."""
        return [
            (trained, tested)
            for trained in self.about["trained"]
            for tested in self.tasks
            if (trained == tested) == same
        ]

    def of(self, variant: str, trained: str) -> list[CellResult]:
        """The cells of a variant that are trained on a task, one a seed.

        Those of the base model belong to every task.
        """
        return [
            cell
            for cell in self.cells
            if cell.variant == variant and cell.trained in (None, trained)
        ]

    def runs(
        self, variant: str, pair: tuple[str, str], mode: str, judge: str | None = None
    ) -> dict[int, np.ndarray]:
        """The answers of a variant's finished cells for a (trained on, tested on) pair.

        Returns seed → bools of shape (items,), whether each test item is answered right by a
        judge, which is that of training unless another one is named.
        """
        trained, tested = pair
        found = {
            cell.seed: self.verdicts(cell, tested, judge) for cell in self.of(variant, trained)
        }
        return {seed: modes[mode] for seed, modes in found.items() if modes}

    def verdicts(
        self, cell: CellResult, task: str, judge: str | None = None
    ) -> dict[str, np.ndarray]:
        """Mode → whether each item is answered right by a judge; empty if it has judged none."""
        found = cell.correct if judge in (None, self.judge) else cell.other_judges.get(judge, {})
        return found.get(task, {})


def cell_folder(output: Path, variant: str, trained: str | None, seed: int) -> Path:
    """The folder of a cell in the experiment's folder `output`."""
    return output.joinpath("cells", variant, *filter(None, [trained]), f"seed{seed}")


def common(*runs: dict[int, np.ndarray]) -> list[Runs]:
    """Reduce the runs (seed → answers) of several variants to the seeds that all of them have."""
    seeds = sorted(set.intersection(*(set(each) for each in runs)))
    return [[each[seed] for seed in seeds] for each in runs]


def read_results(output: Path) -> Results:
    """Read experiment.json and the files of all cells.

    Raises UserError for a folder that holds no experiment, and for a damaged file, which it names.
    """
    path = output / "experiment.json"
    if not path.exists():
        raise UserError(f"{path} does not exist: name the folder of an experiment.")
    try:
        about = read_sealed(path, DESCRIBED)
        results = Results(output, about, [])
        items = {task: about["tasks"][task]["items"] for task in results.tasks}
        models = [
            (BASE, None),
            *(
                (method, task)
                for task in about["trained"]
                for method in results.methods
                if task in results.trained_on(method)
            ),
        ]
        if not all(about[name] for name in ("preset", "model", "axis", "seeds")):
            raise ValueError("a value is empty")
        if not all(type(seed) is int for seed in about["seeds"]):
            raise ValueError("seeds are no whole numbers")
        if results.judge not in NAMES:
            raise ValueError(f"judge is {shortened(results.judge)}")
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise UserError(f"{path} is damaged ({shortened(error)}): restore it.") from error
    results.cells = [
        read_cell(output, variant, trained, seed, items)
        for variant, trained in models
        for seed in about["seeds"]
    ]
    return results


def read_cell(
    output: Path, variant: str, trained: str | None, seed: int, items: Mapping[str, int]
) -> CellResult:
    """Read what a cell has recorded; `items` are the numbers of test items by task.

    Raises UserError for a damaged cell.json or failed.json, and for another file of a finished cell
    that is not what was written.
    """
    cell = CellResult(cell_folder(output, variant, trained, seed), variant, trained, seed)
    finished = cell.folder / "cell.json"
    if finished.exists():
        try:
            record = read_sealed(finished, RECORDED)
            named = [record.get(name) for name in ("variant", "trained", "seed")]
            if named != [variant, trained, seed]:
                raise ValueError("it is that of another cell")
            if damage := files_finding(cell.folder, record.get("files", {})):
                raise ValueError(damage)
            cell.seconds = {
                name: _number(record["seconds"][name]) for name in ("train", "evaluate")
            }
            peak = record["peak_memory"]
            cell.peak_memory = None if peak is None else _number(peak)
            cell.correct = {
                task: _answers(record["correct"][task], count) for task, count in items.items()
            }
            cell.other_judges = {
                judge: {task: _answers(modes, items[task]) for task, modes in tasks.items()}
                for judge, tasks in record.get("other_judges", {}).items()
            }
        except (KeyError, TypeError, ValueError, OverflowError, AttributeError) as error:
            raise UserError(
                f"{finished} is damaged ({shortened(error, 200)}): remove it, and run the "
                "experiment again."
            ) from error
    else:
        cell.error = _failure(cell.folder / "failed.json")
    return cell


def _failure(path: Path) -> str:
    """Return why a cell has failed; "" where that is not recorded, or no longer."""
    try:
        return str(read_json_object(path).get("error", "?")) if path.exists() else ""
    except UserError:
        if path.exists():
            raise
        return ""  # another process has just begun the cell again


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_text(encoding="utf-8", errors="replace"))
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no JSON: remove it, and run the experiment again.") from error


def _number(value: Any) -> float:
    """A time or an amount of memory; ValueError for anything else."""
    if type(value) not in (int, float) or not 0 <= value < 1e100:
        raise ValueError(f"{shortened(value)} is no number that was measured")
    return float(value)


def _answers(modes: dict[str, str], count: int) -> dict[str, np.ndarray]:
    """The strings of 0 and 1, one a mode, as bools; ValueError if they are not of `count` items."""
    for mode in MODES:
        if not _BITS.fullmatch(modes[mode]) or len(modes[mode]) != count:
            raise ValueError(f"{mode} answers are not {count} times 0 or 1")
    return {mode: np.frombuffer(modes[mode].encode(), dtype=np.uint8) == ord("1") for mode in MODES}
