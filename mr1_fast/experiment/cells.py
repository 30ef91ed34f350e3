"""The cells of an experiment: which models are trained, from what, and with which settings.

A cell is one model: trained as one variant says, on one task, from one seed, and tested on both
tasks. `run_cell.py` trains and tests it; `results.py` reads back what it has recorded.
"""

import json
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from ..command_line import parse_train_config
from ..config import TaskConfig, TrainConfig
from ..errors import UserError
from ..files import atomic_folder, restore_folder
from ..integrity import CHECKSUMS, checksums, folder_finding, read_sealed
from ..locks import if_free, one_at_a_time
from ..profiles import BUILT_IN
from ..start import supervised_start
from ..tasks.data import load_examples
from ..types import Example
from .prompts import KeptPrompts
from .results import BASE as BASE_NAME
from .results import CellResult, cell_folder, read_cell
from .scales import ROLES, Scale
from .studies import GRPO, Study, Variant

BASE = Variant(BASE_NAME, "base model", {})
"""The variant of the cells that are not trained."""

AGAIN = "make room there, then run the command again"
"""The way out where a file of a cell cannot be written."""


@dataclass(frozen=True)
class Cell:
    """A model of the experiment."""

    variant: Variant
    trained: str | None
    """The task that it is trained on; None for the base model."""
    seed: int

    def __str__(self) -> str:
        return " · ".join(filter(None, (self.variant.label, self.trained, f"seed {self.seed}")))

    def folder(self, output: Path) -> Path:
        """Its folder in the experiment's folder `output`."""
        return cell_folder(output, self.variant.name, self.trained, self.seed)

    def identity(self) -> dict[str, Any]:
        """The entries that name it in its files."""
        return {"variant": self.variant.name, "trained": self.trained, "seed": self.seed}


@dataclass(frozen=True)
class Experiment:
    """A scale and a study, with what the user says about them."""

    scale: Scale
    study: Study
    output: Path
    """The folder of the experiment."""
    seeds: tuple[int, ...]
    overrides: Mapping[str, Any]
    """Settings of `mr1_fast.train` that replace the preset's in every cell."""
    image_roots: Mapping[str, str | None]
    """Task → folder with the images of its test set, where that is not drawn."""
    items: int | None = None
    """Number of test items of each task; None stands for the preset's."""

    @property
    def model(self) -> str:
        """The model that all cells start from; a built-in one gets a supervised start first."""
        return self.overrides.get("model", self.scale.model)

    @property
    def curve_every(self) -> int:
        """Steps between the points of the learning curve; 0 where the scale has none."""
        return self.scale.curve_every and (self.study.curve_every or self.scale.curve_every)

    def trained_on(self, variant: Variant) -> list[str]:
        """The tasks that a variant is trained on: those whose data have what it learns from."""
        tasks = self.scale.tasks
        return [role for role in self.study.trained if tasks[role].can_train(variant.settings)]

    def cells(self) -> list[Cell]:
        """All cells, seed by seed: the base model first, then what is trained from it."""
        cells = []
        for seed in self.seeds:
            cells.append(Cell(BASE, None, seed))
            cells += [
                Cell(variant, role, seed)
                for role in self.study.trained
                for variant in self.study.variants
                if role in self.trained_on(variant)
            ]
        return cells

    def settings(self, cell: Cell, model: str | None = None) -> TrainConfig:
        """The settings that a cell is trained with, from `model` if it is given.

        They are parsed as `python -m mr1_fast.train` parses its arguments. The settings of the
        method replace those of the scale, so that no scale can make two methods differ in anything
        else; the user's replace both. The base model gets the settings of GRPO.
        """
        role, variant = (cell.trained, cell.variant) if cell.trained else (ROLES[0], GRPO)
        values = {
            **self.scale.settings,
            **self.scale.tasks[role].train,
            **self.study.settings,
            **variant.settings,
            **variant.by_role.get(role, {}),
            **self.overrides,
            "model": model or self.model,
            "seed": cell.seed,
            "eval_samples": 0,
            "output": self.run_folder(cell),
        }
        return parse_train_config(
            [f"--{name}={_argument(value)}" for name, value in values.items()], processes=1
        )

    def run_folder(self, cell: Cell) -> Path:
        """The run folder of a cell's training."""
        return cell.folder(self.output) / "run"

    def base(self, seed: int) -> str:
        """The model that the cells of a seed start from: a folder, or a name on the hub.

        A built-in model gets a supervised start on both tasks. It is kept with the cells, since the
        user's cache may be emptied, and another version of torch would make another start.
        """
        if not self.has_starts:
            return self.model
        kept = self._start(seed)
        with one_at_a_time(kept, AGAIN):
            restore_folder(kept)
            damage = folder_finding(kept, unsealed=True) if kept.exists() else ""
            if damage or not kept.exists():
                start = supervised_start(
                    self.model, self._started_on(), seed, self.scale.start_accuracy
                )
                if damage:
                    _require_same_start(kept, start, damage)
                with atomic_folder(kept, AGAIN) as folder:
                    shutil.copytree(start, folder, dirs_exist_ok=True)
        return str(kept)

    @property
    def has_starts(self) -> bool:
        """Whether the model gets a supervised start for each seed."""
        return self.model in BUILT_IN and self.scale.start_accuracy > 0

    def waits_for_start(self, seed: int) -> bool:
        """Return whether another process makes the start of a seed at this moment."""
        if not self.has_starts or self._start(seed).exists():
            return False
        with if_free(self._start(seed), AGAIN) as is_free:
            return not is_free

    def _start(self, seed: int) -> Path:
        """The folder of the start of a seed."""
        return self.output / "starts" / f"seed{seed}"

    def _started_on(self) -> list[TaskConfig]:
        """The tasks of the supervised start."""
        trained = (self.scale.tasks[role].train for role in ROLES)
        return [TaskConfig(task=each["task"], difficulty=each["difficulty"]) for each in trained]

    @cached_property
    def test_items(self) -> dict[str, list[Example]]:
        """The test items of both tasks: the same for every cell, so that cells can be paired."""
        found = {}
        for role, task in self.scale.tasks.items():
            source = {
                "seed": 0,
                "split": self.study.split,
                "image_root": self.image_roots.get(role),
                **task.test,
            }
            try:
                found[role] = load_examples(**source).all(self.items or task.items)
            except UserError as error:
                raise UserError(
                    f"{error} In an experiment, --{role}-images is the image_root of that data."
                ) from error
        return found

    @cached_property
    def validation_items(self) -> dict[str, list[Example]]:
        """The items of both tasks that learning curves are measured on."""
        # A learning-rate search tests on validation items of seed 0; these are others.
        return {
            role: load_examples(**{"seed": 1, "split": "validation", **task.test}).all(
                self.scale.curve_items
            )
            for role, task in self.scale.tasks.items()
        }

    @cached_property
    def prompts(self) -> KeptPrompts:
        """The prompts of these items, encoded: the same for every cell."""
        return KeptPrompts()

    def result(self, cell: Cell) -> CellResult:
        """What the cell has recorded so far; UserError for a damaged file."""
        items = {role: len(examples) for role, examples in self.test_items.items()}
        return read_cell(self.output, cell.variant.name, cell.trained, cell.seed, items)


def _require_same_start(kept: Path, start: Path, damage: str) -> None:
    """Raise UserError unless a start that was just made is the one that was kept, now damaged."""
    made = checksums(start)
    try:
        known = read_sealed(kept / CHECKSUMS).get("files")
    except ValueError:
        known = checksums(kept)
    if known != made:
        raise UserError(
            f"{kept} is damaged ({damage}), and these versions make another start: restore it, or "
            "run the experiment anew with another --output."
        )


def _argument(value: Any) -> str:
    """A setting's value as the text of a command-line argument."""
    if value is None or isinstance(value, bool | dict | list):
        return json.dumps(value)
    return str(value)
