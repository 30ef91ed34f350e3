"""The dry run: what is left to do in an experiment, and what time and memory it will take."""

from dataclasses import replace
from pathlib import Path

from ..model.known import find_model_config
from ..plan.plan import make_plan, usable_bytes
from .cells import Cell, Experiment

CARD = 24.0
"""Memory of the GPU that is planned for, in the GB of its name."""


def dry_run(experiment: Experiment) -> str:
    """A table with a line for each cell: its state, steps, minutes, and peak memory in GiB."""
    scale = experiment.scale
    memory: dict[tuple, float] = {}
    lines = [f"{'cell':<52}{'state':<10}{'steps':>6}{'minutes':>9}{'GiB':>8}"]
    total = 0.0
    for cell in experiment.cells():
        config, state = experiment.settings(cell), _state(cell.folder(experiment.output))
        seconds = 0.0
        if scale.measured and state != "finished":
            seconds = estimated_seconds(experiment, cell)
        total += seconds

        # Planning takes a while: cells of one algorithm, group size and task share a plan.
        key = (config.algo, config.num_generations, cell.trained)
        if key not in memory:
            memory[key] = estimated_memory(experiment, cell)
        steps = config.steps if cell.trained else 0
        minutes = f"{seconds / 60:.1f}" if scale.measured else "?"
        lines.append(f"{cell!s:<52}{state:<10}{steps:>6}{minutes:>9}{memory[key] / 2**30:>8.2f}")

    peak = f"memory is the plan's peak, on a card with {CARD:.0f} GB"
    if scale.measured:
        lines.append(f"about {total / 60:.0f} minutes; {peak}")
        lines.append(f"times are of {scale.measured_on}")
    else:
        lines.append(f"{peak}; nobody has measured the time at this scale")
    return "\n".join(lines)


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
    plan = make_plan(config, model_config, usable=usable_bytes(CARD))
    return plan.peak if cell.trained else plan.total("evaluation")


def estimated_seconds(experiment: Experiment, cell: Cell) -> float:
    """Time of the cell in seconds, from the times that were measured at the experiment's scale."""
    scale, config = experiment.scale, experiment.settings(cell)
    items = sum(experiment.items or task.items for task in scale.tasks.values())
    evaluation = 2 * items * scale.measured["evaluation"]  # greedy and sampled
    if not cell.trained:
        return evaluation + scale.measured["start"]
    if experiment.curve_every:
        points = 1 + -(-config.steps // experiment.curve_every)
        evaluation += points * len(scale.tasks) * scale.curve_items * scale.measured["evaluation"]
    if config.algo == "sft":
        return evaluation + config.steps * scale.measured["sft"]

    # A step was measured with 8 completions of each prompt.
    return evaluation + config.steps * scale.measured["grpo"] * config.num_generations / 8
