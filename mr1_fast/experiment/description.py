"""experiment.json: what an experiment is, which its report tells beside its numbers."""

import json
import platform
import shlex
import time
from pathlib import Path
from typing import Any

import torch
import transformers

from ..errors import UserError, shortened
from ..files import write_text
from ..integrity import read_sealed, sealed
from ..locks import one_at_a_time
from ..version import __version__
from .cells import BASE, Experiment
from .results import DESCRIBED
from .scales import ROLES
from .settings import ExperimentConfig
from .studies import Variant

IDENTITY = ("preset", "settings", "test_items")
"""Entries that every call in the same folder must agree on, since finished cells are kept."""
WAY_OUT = "choose another with --output"
"""The way out where experiment.json cannot be written."""


def describe(config: ExperimentConfig, experiment: Experiment, argv: list[str]) -> dict[str, Any]:
    """The content of experiment.json for a call with the arguments `argv`."""
    scale, study = experiment.scale, experiment.study
    command = shlex.join(["python", "-m", "mr1_fast.experiment", *argv])
    return {
        "preset": config.preset,
        "command": command.replace("\n", " "),  # a call a line: see `_with_earlier`
        "date": time.strftime("%Y-%m-%d"),
        "hardware": _hardware(),
        "versions": {
            "mr1_fast": __version__,
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "model": experiment.model,
        "paper": scale.paper,
        "judge": experiment.settings(experiment.cells()[0]).judge,
        "tasks": {
            role: {
                "about": task.about,
                "items": len(experiment.test_items[role]),
                "split": study.split,
            }
            for role, task in scale.tasks.items()
        },
        "axis": {"name": study.name, "label": study.label, "numeric": study.numeric},
        "variants": [_variant(variant, experiment) for variant in (BASE, *study.variants)],
        "trained": list(study.trained),
        "seeds": list(experiment.seeds),
        "test_items": experiment.items,
        "settings": settings_of(experiment),
        "notes": notes(experiment),
    }


def settings_of(experiment: Experiment) -> dict[str, Any]:
    """The settings of all cells, with those of a task under its role, and of each variant."""
    scale, study = experiment.scale, experiment.study
    return {
        **scale.settings,
        **{role: dict(scale.tasks[role].train) for role in ROLES},
        **study.settings,
        **experiment.overrides,
        "start_accuracy": scale.start_accuracy,
        "variants": {v.name: {**v.settings, **v.by_role} for v in study.variants},
    }


def _variant(variant: Variant, experiment: Experiment) -> dict[str, Any]:
    value = {} if variant.value is None else {"value": variant.value}
    trained = experiment.trained_on(variant)
    return {"name": variant.name, "label": variant.label, "trained": trained, **value}


def notes(experiment: Experiment) -> list[str]:
    """Sentences about the design, which a reader of the report must know to trust it."""
    scale = experiment.scale
    lines = [
        "All methods of a seed start from the same model and see the same training samples in the "
        "same order; GRPO and GRPO-D sample with the same seeds. Test items are the same for every "
        "cell.",
    ]
    for role in experiment.study.trained:
        variants = experiment.study.variants
        left_out = [each.label for each in variants if role not in experiment.trained_on(each)]
        if left_out:
            lines.append(
                f"The data to train {role} on have no worked solutions: {', '.join(left_out)} is "
                "not trained on it, and has no part in headlines, which are about all tasks."
            )
    if not experiment.has_starts:
        return lines

    lines.append(
        f"The base model is {experiment.model} after a supervised start on both tasks together, on "
        f"items of their own, which ends once at least {scale.start_accuracy:.0%} of its sampled "
        "answers are right on validation items of each task."
    )
    if experiment.study.split == "test":
        lines.append(
            "Test items share neither parameters nor images with training or validation items."
        )
    else:
        lines.append(
            f"The cells are tested on {experiment.study.split} items, since this experiment serves "
            "to choose a setting; test items are kept for the reports."
        )
    return lines


def remember(description: dict[str, Any], output: Path) -> None:
    """Write `output`/experiment.json, with what earlier calls were added: see `_with_earlier`.

    Raises UserError where the folder holds an experiment that differs in IDENTITY, or where the
    file is damaged.
    """
    path = output / "experiment.json"
    with one_at_a_time(path, WAY_OUT):
        if path.exists():
            description = _with_earlier(description, path)
        write_text(path, sealed(description), WAY_OUT)


def _with_earlier(description: dict[str, Any], path: Path) -> dict[str, Any]:
    """Return a description with what the file `path` has of earlier calls added.

    These are seeds, commands (one a line), dates, machines and versions.
    """
    try:
        earlier = read_sealed(path, DESCRIBED)
        written = json.loads(json.dumps(description))
        changed = [name for name in IDENTITY if earlier[name] != written[name]]
        seeds = sorted({*earlier["seeds"], *description["seeds"]})
        calls = {
            "command": _joined(earlier["command"], description["command"], "\n"),
            "date": _joined(earlier["date"], description["date"]),
            "hardware": _joined(earlier["hardware"], description["hardware"]),
            "versions": {
                name: _joined(earlier["versions"].get(name, version), version)
                for name, version in description["versions"].items()
            },
        }
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{path} is damaged ({shortened(error)}): remove it, or choose another --output."
        ) from error
    if changed:
        raise UserError(
            f"{path.parent} holds an experiment with other {', '.join(changed)}: choose another "
            "--output."
        )
    return {**description, "seeds": seeds, **calls}


def _joined(earlier: str, now: str, between: str = "; ") -> str:
    """What earlier calls were, and what this one is if that is another."""
    return between.join(dict.fromkeys((*earlier.split(between), now)))


def _hardware() -> str:
    """The name of the GPU, or that of the processor with the number of threads that torch uses."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        name = next(
            line.partition(":")[2].strip() for line in lines if line.startswith("model name")
        )
    except (OSError, StopIteration):
        name = platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{name}, {threads} thread{'s' if threads > 1 else ''}"
