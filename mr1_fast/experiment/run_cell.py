"""Training and testing one cell of an experiment.

A cell is finished once cell.json is in its folder; that file is written last, and a finished cell
is never run again. A cell that was interrupted goes on from its last checkpoint. One that failed
leaves failed.json, and is tried again the next time.
"""

import gc
import json
import time
import traceback
from collections.abc import Callable
from contextlib import redirect_stdout
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

from ..accuracy import evaluate, judged, summarise
from ..command_line import parse_train_config
from ..config import TrainConfig
from ..distributed import SINGLE
from ..errors import UserError, stop_behind
from ..evaluate.held_out import MODES, answers
from ..evaluate.judges import other_judges
from ..evaluate.r1v import write_r1v_results
from ..files import append_line, remove_folder, restore_folder, shorten, write_json, write_text
from ..integrity import FileChecks, checksum, checksums, files_finding, read_sealed, sealed
from ..model.policy import Policy
from ..plan.out_of_memory import MemoryLimits
from ..plan.run_memory import RunMemory
from ..report.records import end_before
from ..resuming import AutoResumed, saved_steps
from ..rollout.sampling import Sampling
from ..start import load_policy
from ..tasks import get_task
from ..train import train
from ..types import Example
from .cells import AGAIN, Cell, Experiment

SHOWN_PER_TASK = 4
"""Number of test items of each task whose answers the report shows."""

TRAINED = "trained.json"
"""The file with the checksums of a cell's model, from the end of training on."""


def run_cell(experiment: Experiment, cell: Cell) -> None:
    """Run what is missing of the cell, which records its result or its failure in its folder.

    An exception of the cell does not leave this function: it is recorded in failed.json, with its
    traceback, so that the other cells can go on.
    """
    folder = cell.folder(experiment.output)
    finished, failed = folder / "cell.json", folder / "failed.json"
    if not finished.exists():
        folder.mkdir(parents=True, exist_ok=True)
        failed.unlink(missing_ok=True)
        try:
            with (folder / "log.txt").open("a", encoding="utf-8") as log, redirect_stdout(log):
                record = _train_and_test(experiment, cell, folder)
            record["files"] = _evidence(folder)
            write_text(finished, sealed(record), AGAIN)
        except Exception as error:
            if stop := stop_behind(error):  # as where it comes up in the middle of closing a file
                raise stop from error
            reason = " ".join(str(error).split())
            if not isinstance(error, UserError):
                reason = f"{type(error).__name__}: {reason}"
            record = {**cell.identity(), "error": reason, "traceback": traceback.format_exc()}
            write_json(failed, record, AGAIN)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()


def _train_and_test(experiment: Experiment, cell: Cell, folder: Path) -> dict[str, Any]:
    """Train the cell's model if it is not trained yet, and test it; the content of cell.json."""
    started, run = time.perf_counter(), experiment.run_folder(cell)
    config = experiment.settings(cell, experiment.base(cell.seed))
    if cell.trained and not _is_trained(run, folder):
        _train(experiment, config, run, folder / "curve.jsonl")
        record = {"files": checksums(run / "final")}
        write_text(folder / TRAINED, sealed(record), AGAIN)

    trained = time.perf_counter()
    if cell.trained:
        config = replace(config, model=str(run / "final"), lora=False)
    verdicts = _test(experiment, config, cell, folder)
    correct = verdicts.pop(config.judge)
    return {
        **cell.identity(),
        "seconds": {"train": trained - started, "evaluate": time.perf_counter() - trained},
        "steps": config.steps if cell.trained else 0,
        "peak_memory": _peak_memory(run),
        "correct": correct,
        **({"other_judges": verdicts} if verdicts else {}),
    }


def _is_trained(run: Path, folder: Path) -> bool:
    """Return whether the model of a cell is there, as training has left it.

    One that is not is made again from the last checkpoint, which takes no step.
    """
    restore_folder(run / "final")
    if not (run / "final").exists():
        return False
    try:
        damage = files_finding(run / "final", read_sealed(folder / TRAINED).get("files"))
    except ValueError as error:
        damage = str(error)
    if damage:
        tqdm.write(f"{run / 'final'} is not what was trained ({damage}): it is made again.")
    return not damage


def _evidence(folder: Path) -> FileChecks:
    """Return the checksums of what a cell has recorded: answers, samples, curve and metrics.

    Hidden files are what a killed process had begun to write: they go with the next save.
    """
    others = {"cell.json", "failed.json", "log.txt"}
    paths = [path for path in folder.iterdir() if path.is_file() and path.name not in others]
    paths = [path for path in paths if not path.name.startswith(".")]
    paths += [*(folder / "images").glob("*.png"), *(folder / "run").glob("metrics.jsonl")]
    return {path.relative_to(folder).as_posix(): checksum(path) for path in sorted(paths)}


def _train(experiment: Experiment, config: TrainConfig, run: Path, curve: Path) -> None:
    """Train from the last checkpoint in the run folder, or anew if there is none."""
    steps = saved_steps(run / "checkpoints")
    if steps:
        config = parse_train_config(["--resume", str(run)], processes=1)
        config.resume = AutoResumed(run)
        shorten(curve, end_before(curve, steps[-1] + 1), AGAIN)
    else:
        remove_folder(run)
        curve.unlink(missing_ok=True)
    watch = _watch(experiment, config, curve) if experiment.curve_every else None
    train(config, watch, SINGLE)
    if not (run / "final").exists():
        raise UserError("max_hours were over: run the command again to go on.")


def _watch(
    experiment: Experiment, config: TrainConfig, curve: Path
) -> Callable[[Policy, int], None]:
    """A function for `train` to call after each step, which records the learning curve.

    Every `curve_every` steps, and after the last, it appends the greedy accuracy on validation
    items of both tasks to the file `curve`.
    """
    scale, items = experiment.scale, experiment.validation_items
    sampling = Sampling.of(config, temperature=0.0)

    def watch(policy: Policy, done: int) -> None:
        if done % experiment.curve_every and done != config.steps:
            return
        point, sharing = {"step": done}, experiment.prompts.of(policy)
        for role, task in scale.tasks.items():
            judge = get_task(task.test["task"]).judge(config.judge)
            records = evaluate(sharing, judge, items[role], sampling)
            point[role] = summarise(records)["accuracy"]
        shorten(curve, end_before(curve, done), AGAIN)  # those of a checkpoint that was damaged
        append_line(curve, point, AGAIN)

    return watch


def _test(
    experiment: Experiment, config: TrainConfig, cell: Cell, folder: Path
) -> dict[str, dict[str, dict[str, str]]]:
    """Let the model answer the test items of both tasks, greedily and by sampling.

    Writes all answers in R1-V's layout, and the first ones to samples.json for the report. Returns
    judge → task → mode → a character for each item, 1 if the answer is right and 0 if it is wrong.
    The judge of training judges both tasks, and others those on data that published figures are of.
    """
    policy = experiment.prompts.of(load_policy(config))
    longest = max(map(len, experiment.test_items.values()))
    memory = RunMemory(policy, replace(config, eval_samples=longest))
    limits = MemoryLimits(tqdm.write, memory.advise, memory.amounts())
    verdicts: dict[str, dict[str, dict[str, str]]] = {}
    shown = []
    for role, items in experiment.test_items.items():
        test = experiment.scale.tasks[role].test
        task = test["task"]
        for mode in MODES:
            records = answers(policy, replace(config, task=task), items, mode, limits)
            write_r1v_results(folder / f"{role}-{mode}.json", records, task)
            by_judge = {config.judge: records}
            for other in other_judges(config.judge, test["data"]):
                by_judge[other] = judged(records, get_task(task).judge(other))
            for name, found in by_judge.items():
                bits = "".join(str(int(record["correct"][0])) for record in found)
                verdicts.setdefault(name, {}).setdefault(role, {})[mode] = bits
            if mode == "greedy":
                # The images are the same for all cells: the base model's folder holds them.
                images = None if cell.trained else folder / "images"
                shown += _record_samples(role, items, records, images)
    write_json(folder / "samples.json", shown, AGAIN)
    return verdicts


def _record_samples(
    role: str, items: list[Example], records: list[dict], images: Path | None
) -> list[dict]:
    """Return the first items with their answers, and write their images to the folder `images`."""
    shown = []
    for index, (item, record) in enumerate(zip(items[:SHOWN_PER_TASK], records, strict=False)):
        name = f"{role}-{index}.png" if item.images else None
        if images and name:
            images.mkdir(exist_ok=True)
            item.images[0].save(images / name)
        shown.append(
            {
                "task": role,
                "problem": item.problem,
                "solution": item.solution,
                "text": record["outputs"][0],
                "correct": record["correct"][0],
                "image": name,
            }
        )
    return shown


def _peak_memory(run: Path) -> int | None:
    """The largest peak of allocated memory that the steps of a run have recorded, in bytes.

    It is None on a CPU, where none is recorded.
    """
    metrics = run / "metrics.jsonl"
    lines = metrics.read_text().splitlines() if metrics.exists() else []
    peaks = [
        value
        for line in lines
        for name, value in json.loads(line).items()
        if name.startswith("peak_gib_")
    ]
    return int(max(peaks) * 2**30) if peaks else None
