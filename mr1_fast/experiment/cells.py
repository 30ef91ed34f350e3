"""One cell of an experiment: a model trained as one variant says, on one task, from one seed; tested on both tasks.

A cell is finished once cell.json stands in its folder, which is written last; it is never run again. An interrupted one
goes on from its last checkpoint; one that failed leaves failed.json and is tried again next time.
"""

import gc
import json
import shutil
import time
import traceback
from collections.abc import Mapping
from contextlib import redirect_stdout
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..accuracy import evaluate, summarise
from ..command_line import parse_train_config
from ..config import BUILT_IN, TaskConfig, TrainConfig
from ..errors import UserError
from ..evaluate.held_out import MODES, answers
from ..evaluate.r1v import write_r1v_results
from ..files import append_line, atomic_folder, keep_lines_before, write_json
from ..model.policy import Policy
from ..plan.out_of_memory import Room
from ..plan.run_memory import RunMemory
from ..rollout.sampling import Sampling
from ..start import load_policy, supervised_start
from ..tasks.data import load_examples
from ..train import train
from ..types import Example
from .presets import GRPO, ROLES, Scale, Study, Variant
from .results import BASE as BASE_NAME
from .results import cell_folder

BASE = Variant(BASE_NAME, "base model", {})
SHOWN = 4
"""Test items of each task whose answers the report shows."""


@dataclass(frozen=True)
class Cell:
    """Which model: the variant, the task it is trained on (None for the base model), and the seed."""

    variant: Variant
    trained: str | None
    seed: int

    def __str__(self) -> str:
        return " · ".join(filter(None, (self.variant.label, self.trained, f"seed {self.seed}")))

    def folder(self, output: Path) -> Path:
        """Where it writes."""
        return cell_folder(output, self.variant.name, self.trained, self.seed)

    def identity(self) -> dict[str, Any]:
        """What names it in its files."""
        return {"variant": self.variant.name, "trained": self.trained, "seed": self.seed}


@dataclass(frozen=True)
class Experiment:
    """A scale and a study with what the user says about them."""

    scale: Scale
    study: Study
    output: Path
    seeds: tuple[int, ...]
    overrides: Mapping[str, Any]
    """Settings of `mr1_fast.train` for every cell, over the preset's."""
    image_roots: Mapping[str, str | None]
    """Role: the folder with the images of its test set, where that is not drawn."""
    items: int | None = None
    """Test items of each task; None: the preset's."""

    @property
    def model(self) -> str:
        """The model that everything starts from, before its supervised start if it is built in."""
        return self.overrides.get("model", self.scale.model)

    def cells(self) -> list[Cell]:
        """The base model of each seed first, then what is trained from it."""
        cells = []
        for seed in self.seeds:
            cells.append(Cell(BASE, None, seed))
            cells += [
                Cell(v, role, seed) for role in self.study.trained for v in self.study.variants
            ]
        return cells

    def settings(self, cell: Cell, model: str | None = None) -> TrainConfig:
        """How a cell is trained, as `python -m mr1_fast.train` reads it; the base model's is that of GRPO.

        What the method says comes last but for the user's settings: no scale can make two methods differ.
        """
        role, variant = cell.trained or ROLES[0], cell.variant if cell.trained else GRPO
        of_variant = {**variant.settings, **variant.by_role.get(role, {})}
        values = {
            **self.scale.settings,
            **self.scale.tasks[role].train,
            **of_variant,
            **self.overrides,
        }
        values |= {"model": model or self.model, "seed": cell.seed, "eval_samples": 0}
        values["output"] = self.run_folder(cell)
        return parse_train_config(
            [f"--{name}={_argument(value)}" for name, value in values.items()]
        )

    def run_folder(self, cell: Cell) -> Path:
        """The run folder of a cell's training."""
        return cell.folder(self.output) / "run"

    def base(self, seed: int) -> str:
        """The model that the cells of a seed start from: a built-in one after its supervised start on both tasks.

        The start is kept with the cells: the user's cache may be emptied, or another torch make another start.
        """
        if self.model not in BUILT_IN or not self.scale.start_accuracy:
            return self.model
        kept = self.output / "starts" / f"seed{seed}"
        if not kept.exists():
            trained = (self.scale.tasks[role].train for role in ROLES)
            tasks = [
                TaskConfig(task=each["task"], difficulty=each["difficulty"]) for each in trained
            ]
            start = supervised_start(self.model, tasks, seed, self.scale.start_accuracy)
            with atomic_folder(kept) as folder:
                shutil.copytree(start, folder, dirs_exist_ok=True)
        return str(kept)

    @cached_property
    def test_items(self) -> dict[str, list[Example]]:
        """The test items of both tasks: the same for every cell, so that cells can be compared in pairs."""
        found = {}
        for role, task in self.scale.tasks.items():
            arguments = {
                "seed": 0,
                "split": self.study.split,
                "image_root": self.image_roots.get(role),
                **task.test,
            }
            try:
                found[role] = load_examples(**arguments).all(self.items or task.items)
            except UserError as error:
                raise UserError(
                    f"{error} In an experiment, --{role}-images is the image_root of that data."
                ) from error
        return found

    def run(self, cell: Cell) -> dict:
        """Run what of the cell is missing; its record, or the record of its failure."""
        folder = cell.folder(self.output)
        finished, failed = folder / "cell.json", folder / "failed.json"
        if finished.exists():
            shutil.rmtree(
                folder / "run" / "checkpoints", ignore_errors=True
            )  # killed between the two
            return read_record(finished)
        folder.mkdir(parents=True, exist_ok=True)
        failed.unlink(missing_ok=True)
        try:
            with (folder / "log.txt").open("a", encoding="utf-8") as log, redirect_stdout(log):
                record = self._run(cell, folder)
            write_json(finished, record)
        except Exception as error:  # whatever it is: the other cells go on, and the report shows it
            reason = " ".join(str(error).split())
            reason = reason if isinstance(error, UserError) else f"{type(error).__name__}: {reason}"
            record = {**cell.identity(), "error": reason}
            write_json(failed, {**record, "traceback": traceback.format_exc()})
        if finished.exists():
            shutil.rmtree(folder / "run" / "checkpoints", ignore_errors=True)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return record

    def _run(self, cell: Cell, folder: Path) -> dict:
        started, run = time.perf_counter(), self.run_folder(cell)
        base = self.base(cell.seed)
        config = self.settings(cell, base)
        if cell.trained and not (run / "final").exists():
            self._train(config, run, folder / "curve.jsonl")
        between = time.perf_counter()
        if cell.trained:
            config = replace(config, model=str(run / "final"), lora=False)
        correct = self._evaluate(config, cell, folder)
        seconds = {"train": between - started, "evaluate": time.perf_counter() - between}
        steps = config.steps if cell.trained else 0
        return {
            **cell.identity(),
            "seconds": seconds,
            "steps": steps,
            **_measured(run),
            "correct": correct,
        }

    def _train(self, config: TrainConfig, run: Path, curve: Path) -> None:
        checkpoints = sorted((run / "checkpoints").glob("step-*"))
        if checkpoints:
            config = parse_train_config(["--resume", str(run)])
            keep_lines_before(curve, int(checkpoints[-1].name.removeprefix("step-")) + 1)
        else:
            shutil.rmtree(run, ignore_errors=True)
            curve.unlink(missing_ok=True)
        train(config, self._watch(config, curve) if self.scale.curve_every else None)

    def _watch(self, config: TrainConfig, curve: Path):
        """Writes the greedy accuracy on validation items of both tasks every so many steps."""
        items = {}
        for role, task in self.scale.tasks.items():
            arguments = {
                "seed": 1,
                "split": "validation",
                **task.test,
            }  # seed 0 is what a search tests on
            items[role] = load_examples(**arguments).all(self.scale.curve_items)
        sampling = Sampling.of(config, temperature=0.0)

        def watch(policy: Policy, done: int) -> None:
            if done % self.scale.curve_every and done != config.steps:
                return
            point = {"step": done}
            for role, task in self.scale.tasks.items():
                point[role] = summarise(evaluate(policy, task.test["task"], items[role], sampling))[
                    "accuracy"
                ]
            append_line(curve, point)

        return watch

    def _evaluate(self, config: TrainConfig, cell: Cell, folder: Path) -> dict[str, dict[str, str]]:
        """Answer the test items of both tasks; R1-V's results files; right or wrong of each item, as 1 or 0."""
        policy, correct, shown = load_policy(config), {}, []
        longest = max(map(len, self.test_items.values()))
        memory = RunMemory(policy, replace(config, eval_samples=longest))
        room = Room(tqdm.write, memory.advise, memory.amounts())
        for role, items in self.test_items.items():
            task = self.scale.tasks[role].test["task"]
            correct[role] = {}
            for mode in MODES:
                records = answers(policy, replace(config, task=task), items, mode, room)
                write_r1v_results(folder / f"{role}-{mode}.json", records, task)
                correct[role][mode] = "".join(str(int(record["correct"][0])) for record in records)
                if mode == "greedy":
                    shown += _shown(
                        role, items, records, None if cell.trained else folder / "images"
                    )
        write_json(folder / "samples.json", shown)
        return correct


def _shown(role: str, items: list[Example], records: list[dict], images: Path | None) -> list[dict]:
    """The first items with their answers; their images go to `images`, which only the base model writes."""
    shown = []
    for index, (item, record) in enumerate(zip(items[:SHOWN], records, strict=False)):
        name = f"{role}-{index}.png" if item.images else None
        if images and name:
            images.mkdir(exist_ok=True)
            item.images[0].save(images / name)
        texts = {"problem": item.problem, "solution": item.solution, "text": record["outputs"][0]}
        shown.append({"task": role, **texts, "correct": record["correct"][0], "image": name})
    return shown


def read_record(path: Path) -> dict:
    """A finished cell's record; UserError for a damaged one."""
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
        complete = all(bits["greedy"] for bits in record["correct"].values()) and record["seconds"]
    except (ValueError, KeyError, TypeError, AttributeError):
        complete = False
    if not complete:
        raise UserError(f"{path} is damaged: remove it, and the cell will run again.")
    return record


def _measured(run: Path) -> dict[str, int | None]:
    """The largest peak of allocated memory that the steps of a run have recorded, in bytes; None on a CPU."""
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    peaks = [
        value
        for line in lines
        for name, value in json.loads(line).items()
        if name.startswith("peak_gib_")
    ]
    return {"peak_memory": int(max(peaks) * 2**30) if peaks else None}


def _argument(value: Any) -> str:
    """A setting's value as a command line has it."""
    return (
        json.dumps(value) if value is None or isinstance(value, bool | dict | list) else str(value)
    )
