"""The dry run: what is left to do in an experiment, and what time and memory it will take."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from ..model.known import find_model_config
from ..plan.plan import make_plan, usable_bytes
from .cards import CARDS, HOW_ESTIMATED, times_on
from .cells import Cell, Experiment
from .scales import Scale

PLANNED = 24.0
"""Memory of the GPU that is planned for, in the GB of its name."""


@dataclass(frozen=True)
class Column:
    """A machine that the dry run tells times of."""

    title: str
    unit: float
    """Seconds in the unit of its figures."""
    times: Mapping[str, float]
    """Those of `Scale.measured` on this machine."""


def dry_run(experiment: Experiment, at_a_time: int = 1) -> str:
    """A table with a line for each cell: its state, steps, times, and peak memory in GiB.

    The lines below it say what all cells take that are left, of which so many run `at_a_time`, and
    where the figures come from.
    """
    columns = time_columns(experiment.scale)
    titles = "".join(f"{column.title:>12}" for column in columns)
    lines = [f"{'cell':<52}{'state':<10}{'steps':>6}{titles}{'GiB':>8}"]
    times: list[list[float]] = []
    memory: dict[tuple, float] = {}
    for cell in experiment.cells():
        config, state = experiment.settings(cell), _state(cell.folder(experiment.output))
        seconds = [
            0.0 if state == "finished" else estimated_seconds(experiment, cell, column.times)
            for column in columns
        ]
        times.append(seconds)

        # Planning takes a while: cells of one algorithm, group size and task share a plan.
        key = (config.algo, config.num_generations, cell.trained)
        if key not in memory:
            memory[key] = estimated_memory(experiment, cell)
        steps = config.steps if cell.trained else 0
        name = f"{cell!s:<52}{state:<10}{steps:>6}"
        lines.append(f"{name}{_shown(columns, seconds)}{memory[key] / 2**30:>8.2f}")

    if columns:
        if experiment.scale.measured_on in CARDS:  # cells that share a card were not measured
            at_a_time = 1
        how = f"{at_a_time} cells at a time" if at_a_time > 1 else "one cell after the other"
        totals = [total_seconds(each, at_a_time) for each in zip(*times, strict=True)]
        lines.append(f"{f'all that is left, {how}':<68}{_shown(columns, totals)}")
    lines += about_times(experiment.scale)
    lines.append(f"memory is the plan's peak, on a card with {PLANNED:.0f} GB")
    return "\n".join(lines)


def total_seconds(seconds: Sequence[float], at_a_time: int) -> float:
    """Return how long cells take of which so many run at a time, each in one process alone."""
    return max(sum(seconds) / at_a_time, *seconds)


def time_columns(scale: Scale) -> list[Column]:
    """Return the machines whose times are known at a scale: the one that was measured.

    Where that is a card, the times of others are estimated from it.
    """
    if not scale.measured:
        return []
    if scale.measured_on not in CARDS:
        return [Column("minutes", 60, scale.measured)]
    measured_on = CARDS[scale.measured_on]
    return [
        Column(f"{name}, h", 3600, times_on(card, measured_on, scale.measured, scale.decoding))
        for name, card in CARDS.items()
    ]


def about_times(scale: Scale) -> list[str]:
    """Return sentences on where the times of a scale come from."""
    if not scale.measured:
        return ["nobody has measured the time at this scale"]
    if scale.measured_on not in CARDS:
        return [
            f"times were measured on {scale.measured_on}: those of a cell with one thread, while "
            "another ran beside it"
        ]
    others = " and ".join(name for name in CARDS if name != scale.measured_on)
    return [
        f"{scale.measured_on}: measured, {scale.measured_how}",
        f"{others}: {HOW_ESTIMATED}",
    ]


def _shown(columns: Sequence[Column], seconds: Sequence[float]) -> str:
    return "".join(
        f"{each / column.unit:>12.1f}" for column, each in zip(columns, seconds, strict=True)
    )


def _state(folder: Path) -> str:
    """Whether a cell is finished or failed, or is still to do, by the files in its folder."""
    if (folder / "cell.json").exists():
        return "finished"
    return "failed" if (folder / "failed.json").exists() else "to do"


def estimated_memory(experiment: Experiment, cell: Cell) -> float:
    """Planned peak memory of the cell, in bytes; that of its evaluation if it trains nothing."""
    items = experiment.items or max(task.items for task in experiment.scale.tasks.values())
    config = replace(experiment.settings(cell), eval_samples=items)
    model_config = find_model_config(experiment.model)
    plan = make_plan(config, model_config, usable=usable_bytes(PLANNED))
    return plan.peak if cell.trained else plan.total("evaluation")


def estimated_seconds(experiment: Experiment, cell: Cell, times: Mapping[str, float]) -> float:
    """Time of the cell in seconds, from the times of `Scale.measured` on some machine."""
    scale, config = experiment.scale, experiment.settings(cell)
    items = sum(experiment.items or task.items for task in scale.tasks.values())
    evaluation = 2 * items * times["evaluation"]  # greedy and sampled
    if not cell.trained:
        return evaluation + times["start"]
    if experiment.curve_every:
        points = 1 + -(-config.steps // experiment.curve_every)
        evaluation += points * len(scale.tasks) * scale.curve_items * times["evaluation"]
    if config.algo == "sft":
        return evaluation + config.steps * times["sft"]

    # A step was measured with 8 completions of each prompt.
    return evaluation + config.steps * times["grpo"] * config.num_generations / 8
