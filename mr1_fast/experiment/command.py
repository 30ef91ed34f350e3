"""Running an experiment: every cell that is missing, in one or several processes, and the report.

Each cell is run by one process alone; sharing.py says by which.
"""

import os
import signal
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path

import torch
import transformers

from ..distributed.launch import join_world, require_shared, work_alone
from ..errors import Stopped, UserError
from ..model.device import resolve_device
from ..torchrun import is_first
from .cells import Cell, Experiment
from .description import describe, remember
from .estimate import dry_run
from .presets import find_preset
from .report import write_report
from .results import CellResult
from .settings import ExperimentConfig
from .sharing import call_moment, run_cells
from .workers import at_a_time, needed, workers

REPORT_SECONDS = 60.0
"""While cells run, the report is written anew whenever the last one is older than this."""


def make_experiment(config: ExperimentConfig) -> Experiment:
    """The experiment that the settings describe; UserError for settings that no cell can have."""
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
    varied = sorted(study.varied() & config.settings.keys())
    if varied:
        names = ", ".join(varied)
        raise UserError(f"settings has {names}, which preset {config.preset} varies: leave it out.")

    # Settings that cannot be used are told now, and not when the cell's turn comes.
    for cell in experiment.cells():
        if cell.seed == experiment.seeds[0]:
            experiment.settings(cell)
    return experiment


def run_experiment(config: ExperimentConfig, argv: list[str]) -> None:
    """Run the cells that are missing, and write the report, which the first process does.

    `argv` are the arguments that the report names as its command. Raises UserError at the end if
    cells have failed.
    """
    experiment = make_experiment(config)
    if config.dry_run:
        if is_first():
            print(dry_run(experiment, at_a_time(experiment, config.processes)))
        return

    started, processes = time.perf_counter(), at_a_time(experiment, config.processes)
    if processes > 1:
        # Also for the last cell alone: its numbers depend on the threads in the last bits.
        torch.set_num_threads(1)
    experiment.test_items  # noqa: B018  missing images are told before anything is written
    any_cell = experiment.settings(experiment.cells()[0])
    world, output = join_world(resolve_device(any_cell).type), experiment.output
    if world.is_first:
        remember(describe(config, experiment, argv), output)
    require_shared(world, output)
    began = world.of_first(call_moment(output) if world.is_first else 0)
    work_alone(world)
    if not world.is_first:
        run_quietly(experiment, began)
        return

    failed = run_and_tell(experiment, began, argv, needed(experiment, processes))
    if experiment.study.name == "search":
        print(search_result(experiment))

    page = write_report(output)
    minutes = (time.perf_counter() - started) / 60
    print(f"report {page} · {page.with_suffix('.md')} · {minutes:.1f} minutes")
    if failed:
        count = "1 cell" if len(failed) == 1 else f"{len(failed)} cells"
        raise UserError(
            f"{count} failed ({'; '.join(failed)}): run the command again to try them again."
        )


def run_and_tell(experiment: Experiment, began: int, argv: list[str], others: int) -> list[str]:
    """Run the cells that are missing, with so many `others` beside this process.

    Returns what is said of the failures.

    Prints a line for each cell that has ended, and writes the report on the way, also when the user
    interrupts.
    """
    told = ToldCells(experiment)
    try:
        with workers(others, [str(os.getpid()), str(began), *argv]) as started:

            def tell(ended: list[Cell]) -> None:
                started.tell_deaths()
                told.tell(ended)

            _run(experiment, began, tell)
    except KeyboardInterrupt as stopped:
        write_report(experiment.output)
        number = stopped.number if isinstance(stopped, Stopped) else signal.SIGINT
        raise Stopped(number, "stopped: run the command again to go on") from stopped
    return told.failed


def run_quietly(experiment: Experiment, began: int) -> None:
    """Run free cells beside the first process, which alone prints and writes the report."""
    with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere), redirect_stdout(nowhere):
        _run(experiment, began, lambda ended: None)


def _run(experiment: Experiment, began: int, tell: Callable[[list[Cell]], None]) -> None:
    transformers.utils.logging.disable_progress_bar()  # each cell loads its models four times
    run_cells(experiment, began, tell)


class ToldCells:
    """The cells that have ended, in whichever process, as the first one tells them."""

    def __init__(self, experiment: Experiment):
        self.experiment, self.count = experiment, len(experiment.cells())
        self.told = 0
        self.failed: list[str] = []
        """What is said of the cells that have failed."""
        self.reported = time.monotonic()

    def tell(self, ended: list[Cell]) -> None:
        """Print a line for each of these cells, and renew the report."""
        for cell in ended:
            result = self.experiment.result(cell)
            if result.error:
                self.failed.append(f"{cell}: {result.error}")
            self.told += 1
            print(f"[{self.told}/{self.count}] {cell}: {_result_line(result)}", flush=True)
        if ended and time.monotonic() - self.reported > REPORT_SECONDS:
            write_report(self.experiment.output)
            self.reported = time.monotonic()


def _result_line(result: CellResult) -> str:
    if result.error:
        return f"FAILED: {result.error}"
    if not result.correct:  # a failure that another call, which has begun since, tries again
        return "is run again by another call"
    shares = (f"{role} {modes['greedy'].mean():.1%}" for role, modes in result.correct.items())
    return f"{', '.join(shares)} (greedy; {sum(result.seconds.values()):.0f} s)"


def search_result(experiment: Experiment) -> str:
    """A line for each learning rate of the study `search`, and a line that names the best.

    A rate is judged by the greedy accuracy on the task that was trained, averaged over all methods
    and tasks: all methods get the same rate, and none gets one that was chosen for it.
    """
    found: dict[float, list[float]] = {}
    for cell in experiment.cells():
        result = experiment.result(cell)
        if cell.trained and result.correct:
            share = float(result.correct[cell.trained]["greedy"].mean())
            found.setdefault(cell.variant.settings["learning_rate"], []).append(share)
    if not found:
        return "no cell finished"

    means = {rate: sum(shares) / len(shares) for rate, shares in found.items()}
    lines = [
        f"learning rate {rate:g}: {mean:.1%} ({len(found[rate])} cells)"
        for rate, mean in means.items()
    ]
    return "\n".join([*lines, f"chosen: {max(means, key=means.get):g}"])
