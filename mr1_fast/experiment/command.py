"""Running an experiment: every cell that is missing, one after the other, and then the report.

The processes that torchrun has started share the cells, each of which one process runs alone.
"""

import os
import signal
import time
from contextlib import redirect_stderr
from pathlib import Path

import transformers

from ..distributed import SINGLE, World
from ..distributed.launch import join_world
from ..errors import Stopped, UserError
from ..locks import exclusive
from ..model.device import resolve_device
from ..torchrun import is_first
from .cells import Cell, Experiment
from .claims import Claims, claims_in
from .description import describe, remember
from .estimate import dry_run
from .presets import find_preset
from .report import write_report
from .results import CellResult
from .run_cell import run_cell
from .settings import ExperimentConfig

REPORT_SECONDS = 60.0
"""While cells run, the report is written anew whenever the last one is older than this."""
LOOK_SECONDS = 0.5
"""How long the first process waits before it looks again whether the cells of others have ended."""


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
            print(dry_run(experiment))
        return

    started = time.perf_counter()
    transformers.utils.logging.disable_progress_bar()  # each cell loads its models four times
    experiment.test_items  # noqa: B018  missing images are told before anything is written
    any_cell = experiment.settings(experiment.cells()[0])
    world = join_world(resolve_device(any_cell).type)
    if not world.is_first:
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):  # no bars
            run_cells(experiment, world)
        return
    taken = f"another process runs the experiment in {experiment.output}: wait for it, or end it."
    with exclusive(experiment.output, taken):
        remember(describe(config, experiment, argv), experiment.output)
        failed = run_cells(experiment, world)
    if experiment.study.name == "search":
        print(search_result(experiment))

    page = write_report(experiment.output)
    minutes = (time.perf_counter() - started) / 60
    print(f"report {page} · {page.with_suffix('.md')} · {minutes:.1f} minutes")
    if failed:
        count = "1 cell" if len(failed) == 1 else f"{len(failed)} cells"
        raise UserError(
            f"{count} failed ({'; '.join(failed)}): run the command again to try them again."
        )


def run_cells(experiment: Experiment, world: World = SINGLE) -> list[str]:
    """Run the cells that are missing, those that no other process runs; returns the failures.

    The first process prints a line for each cell that has ended, waits for the last one, and alone
    knows the failures. It writes the report on the way, also when the user interrupts.
    """
    cells = dict(enumerate(experiment.cells(), start=1))
    try:
        with claims_in(experiment.output, world) as claims:
            ended = EndedCells(experiment, cells, claims)
            for number, cell in cells.items():
                if claims.take(number):
                    run_cell(experiment, cell)
                    claims.end(number)
                if world.is_first:
                    ended.tell()
            while world.is_first and not ended.are_all():
                time.sleep(LOOK_SECONDS)
                ended.tell()
            # torchrun on one machine waits minutes, not hours, for those on the others.
            while not world.is_first and not claims.are_over():
                time.sleep(LOOK_SECONDS)
    except KeyboardInterrupt as stopped:
        if world.is_first:
            write_report(experiment.output)
        number = stopped.number if isinstance(stopped, Stopped) else signal.SIGINT
        raise Stopped(number, "stopped: run the command again to go on") from stopped
    return [ended.failed[number] for number in sorted(ended.failed)]


class EndedCells:
    """The cells that have ended, on whichever process, as the first one tells them."""

    def __init__(self, experiment: Experiment, cells: dict[int, Cell], claims: Claims):
        self.experiment, self.claims, self.count = experiment, claims, len(cells)
        self.left = dict(cells)
        """Cells that were not told yet, by their numbers."""
        self.failed: dict[int, str] = {}
        """What is said of the cells that have failed."""
        self.reported = time.monotonic()

    def are_all(self) -> bool:
        """Return whether every cell was told."""
        return not self.left

    def tell(self) -> None:
        """Print a line for each cell that has ended since the last call, and renew the report."""
        new = [number for number in self.left if self.claims.has_ended(number)]
        for number in new:
            cell = self.left.pop(number)
            result = self.experiment.result(cell)
            if result.error:
                self.failed[number] = f"{cell}: {result.error}"
            print(f"[{number}/{self.count}] {cell}: {_result_line(result)}", flush=True)
        if new and time.monotonic() - self.reported > REPORT_SECONDS:
            write_report(self.experiment.output)
            self.reported = time.monotonic()


def _result_line(result: CellResult) -> str:
    if result.error:
        return f"FAILED: {result.error}"
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
