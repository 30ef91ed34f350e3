"""The paper's comparison in one command: `python -m mr1_fast.experiment --preset tiny`.

Base model, SFT, GRPO and GRPO-D, trained on counting or on geometry, tested on both; ablations are further presets.
"""

import fcntl
import json
import platform
import shlex
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
import transformers

from ..command_line import parse_settings
from ..config import BUILT_IN
from ..errors import UserError
from ..files import write_json
from ..model.known import find_model_config
from ..plan.plan import make_plan
from ..version import __version__
from .cells import BASE, Cell, Experiment, read_record
from .presets import ROLES, find_preset
from .report import write_report
from .settings import ExperimentConfig

IDENTITY = ("preset", "settings", "test_items")
"""What must not change in an output folder: finished cells stay."""
REPORT_SECONDS = 60.0
"""The report is written anew where the last one is older."""


def make_experiment(config: ExperimentConfig) -> Experiment:
    """The experiment that the settings mean; UserError for settings that no cell could have."""
    config.check()
    scale, study = find_preset(config.preset)
    experiment = Experiment(
        scale,
        study,
        Path(config.output or f"experiments/{config.preset}"),
        tuple(config.seeds or study.seeds or scale.seeds),
        config.settings,
        {"counting": config.counting_images, "geometry": config.geometry_images},
        config.test_items,
    )
    varied = {
        name
        for v in study.variants
        for name in (*v.settings, *(n for s in v.by_role.values() for n in s))
    }
    if varied & config.settings.keys():
        names = ", ".join(sorted(varied & config.settings.keys()))
        raise UserError(f"settings has {names}, which preset {config.preset} varies: leave it out.")
    for cell in experiment.cells():
        if cell.seed == experiment.seeds[0]:
            experiment.settings(cell)
    return experiment


def describe(config: ExperimentConfig, experiment: Experiment, argv: list[str]) -> dict:
    """What experiment.json holds: all that the report says beside the cells' numbers."""
    scale, study = experiment.scale, experiment.study
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else _processor()
    variants = [BASE, *study.variants]
    varied = {v.name: {**v.settings, **v.by_role} for v in study.variants}
    settings = {
        **scale.settings,
        **{role: dict(scale.tasks[role].train) for role in ROLES},
        **config.settings,
    }
    return {
        "preset": config.preset,
        "command": shlex.join(["python", "-m", "mr1_fast.experiment", *argv]),
        "date": time.strftime("%Y-%m-%d"),
        "hardware": device,
        "versions": {
            "mr1_fast": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "model": experiment.model,
        "paper": scale.paper,
        "tasks": {
            role: {
                "about": task.about,
                "items": len(experiment.test_items[role]),
                "split": study.split,
            }
            for role, task in scale.tasks.items()
        },
        "axis": {"name": study.name, "label": study.label, "numeric": study.numeric},
        "variants": [
            {"name": v.name, "label": v.label, **({} if v.value is None else {"value": v.value})}
            for v in variants
        ],
        "trained": list(study.trained),
        "seeds": list(experiment.seeds),
        "test_items": experiment.items,
        "settings": {**settings, "start_accuracy": scale.start_accuracy, "variants": varied},
        "notes": notes(experiment),
    }


def notes(experiment: Experiment) -> list[str]:
    """What a reader of the report must know to trust it."""
    scale = experiment.scale
    lines = [
        "All methods of a seed start from the same model and see the same training samples in the same order; GRPO and "
        "GRPO-D sample with the same seeds. Test items are the same for every cell.",
    ]
    if experiment.model in BUILT_IN and scale.start_accuracy:
        lines.append(
            f"The base model is {experiment.model} after a supervised start on both tasks together, on items of their "
            f"own, which ends once at least {scale.start_accuracy:.0%} of its sampled answers are right on validation "
            "items of each task."
        )
        if experiment.study.split == "test":
            lines.append(
                "Test items share neither parameters nor images with training or validation items."
            )
        else:
            lines.append(
                f"Tested on {experiment.study.split} items, to choose by; test items are kept for the report."
            )
    return lines


def remember(description: dict, output: Path) -> None:
    """Write experiment.json, with the seeds of earlier calls; UserError where the folder holds another experiment."""
    path = output / "experiment.json"
    if path.exists():
        try:
            earlier = json.loads(path.read_text(encoding="utf-8"))
            changed = [
                name
                for name in IDENTITY
                if earlier[name] != json.loads(json.dumps(description[name]))
            ]
            seeds = sorted({*earlier["seeds"], *description["seeds"]})
            machines = dict.fromkeys((*earlier["hardware"].split("; "), description["hardware"]))
        except (ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"{path} is damaged ({error}): remove it, or choose another --output."
            ) from error
        if changed:
            raise UserError(
                f"{output} holds an experiment with other {', '.join(changed)}: choose another --output."
            )
        description = {**description, "seeds": seeds, "hardware": "; ".join(machines)}
    write_json(path, description)


def dry_run(experiment: Experiment) -> str:
    """A line a cell: its state, and an estimate of its time and peak memory."""
    scale, plans = experiment.scale, {}
    items = experiment.items or max(task.items for task in scale.tasks.values())
    lines, total = [f"{'cell':<52}{'state':<10}{'steps':>6}{'minutes':>9}{'GiB':>8}"], 0.0
    for cell in experiment.cells():
        config = experiment.settings(cell)
        finished = (cell.folder(experiment.output) / "cell.json").exists()
        failed = (cell.folder(experiment.output) / "failed.json").exists()
        seconds = estimated_seconds(experiment, cell) if scale.measured and not finished else 0.0
        minutes = f"{seconds / 60:.1f}" if scale.measured else "?"
        key = (config.algo, config.num_generations, cell.trained)
        if key not in plans:
            plan = make_plan(
                replace(config, eval_samples=items), find_model_config(experiment.model)
            )
            plans[key] = (plan.peak if cell.trained else plan.total("evaluation")) / 2**30
        state = "finished" if finished else "failed" if failed else "to do"
        steps = config.steps if cell.trained else 0
        lines.append(f"{cell!s:<52}{state:<10}{steps:>6}{minutes:>9}{plans[key]:>8.2f}")
        total += seconds
    if scale.measured:
        lines.append(f"about {total / 60:.0f} minutes; memory is the plan's peak")
        lines.append(f"times are of {scale.measured_on}")
    else:
        lines.append("memory is the plan's peak; nobody has measured the time at this scale")
    return "\n".join(lines)


def estimated_seconds(experiment: Experiment, cell: Cell) -> float:
    """From the measured seconds of a step and of an item's evaluation at this scale."""
    scale, config = experiment.scale, experiment.settings(cell)
    items = sum(experiment.items or task.items for task in scale.tasks.values())
    evaluation = 2 * items * scale.measured["evaluation"]  # greedy and sampled
    if not cell.trained:
        return evaluation + scale.measured["start"]
    if scale.curve_every:
        points = 1 + -(-config.steps // scale.curve_every)
        evaluation += points * len(scale.tasks) * scale.curve_items * scale.measured["evaluation"]
    if config.algo == "sft":
        return evaluation + config.steps * scale.measured["sft"]
    return evaluation + config.steps * scale.measured["grpo"] * config.num_generations / 8


def run(argv: list[str]) -> Path:
    """Run what is missing of the experiment and write its report; UserError at the end if cells failed."""
    config = parse_settings(ExperimentConfig, argv, prog="python -m mr1_fast.experiment")
    experiment = make_experiment(config)
    output = experiment.output
    if config.dry_run:
        print(dry_run(experiment))
        return output
    started = time.perf_counter()
    transformers.utils.logging.disable_progress_bar()  # a cell loads its models four times
    experiment.test_items  # noqa: B018  missing images show before anything is trained or written
    with alone(output):
        remember(describe(config, experiment, argv), output)
        failed = run_cells(experiment)
    if experiment.study.name == "search":
        print(search_result(experiment))
    page = write_report(output)
    print(
        f"report {page} · {page.with_suffix('.md')} · {(time.perf_counter() - started) / 60:.1f} minutes"
    )
    if failed:
        count = "1 cell" if len(failed) == 1 else f"{len(failed)} cells"
        raise UserError(
            f"{count} failed ({'; '.join(failed)}): run the command again to try them again."
        )
    return output


def run_cells(experiment: Experiment) -> list[str]:
    """Run what is missing, a line each, with a report on the way; what failed."""
    cells, failed, reported = experiment.cells(), [], time.monotonic()
    try:
        for number, cell in enumerate(cells, start=1):
            record = experiment.run(cell)
            if "error" in record:
                failed.append(f"{cell}: {record['error']}")
            print(f"[{number}/{len(cells)}] {cell}: {_result(record)}", flush=True)
            if time.monotonic() - reported > REPORT_SECONDS:
                write_report(experiment.output)
                reported = time.monotonic()
    except KeyboardInterrupt:
        write_report(experiment.output)
        raise
    return failed


@contextmanager
def alone(output: Path) -> Iterator[None]:
    """Hold the folder's lock, which ends with the process; UserError where another process has it."""
    try:
        output.mkdir(parents=True, exist_ok=True)
        lock = (output / ".lock").open("a")
    except OSError as error:
        raise UserError(
            f"output {output} cannot be written ({error.strerror}): choose another."
        ) from error
    with lock:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            raise UserError(
                f"another process runs the experiment in {output}: wait for it, or end it."
            ) from error
        yield


def _result(record: dict) -> str:
    if "error" in record:
        return f"FAILED: {record['error']}"
    shares = (f"{role} {_share(bits['greedy']):.1%}" for role, bits in record["correct"].items())
    return f"{', '.join(shares)} (greedy; {sum(record['seconds'].values()):.0f} s)"


def _share(bits: str) -> float:
    return bits.count("1") / len(bits)


def search_result(experiment: Experiment) -> str:
    """A line a learning rate: greedy accuracy on the task that was trained, over methods and tasks; the best is named.

    One learning rate for all methods, chosen for their mean: none gets one of its own.
    """
    found: dict[float, list[float]] = {}
    for cell in experiment.cells():
        path = cell.folder(experiment.output) / "cell.json"
        if cell.trained and path.exists():
            rate = cell.variant.settings["learning_rate"]
            bits = read_record(path)["correct"][cell.trained]["greedy"]
            found.setdefault(rate, []).append(_share(bits))
    means = {rate: sum(shares) / len(shares) for rate, shares in found.items()}
    lines = [
        f"learning rate {rate:g}: {mean:.1%} ({len(found[rate])} cells)"
        for rate, mean in means.items()
    ]
    return (
        "\n".join([*lines, f"chosen: {max(means, key=means.get):g}"])
        if means
        else "no cell finished"
    )


def _processor() -> str:
    """The processor's name, as Linux knows it, and the threads that torch uses."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(
            line.partition(":")[2].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    return f"{name}, {torch.get_num_threads()} threads"


def main() -> None:
    """`python -m mr1_fast.experiment`."""
    run(sys.argv[1:])
