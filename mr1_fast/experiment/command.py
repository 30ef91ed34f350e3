"""Running an experiment: every cell that is missing, one after the other, and then the report."""

import signal
import time
from pathlib import Path

import transformers

from ..errors import Stopped, UserError
from .cells import Experiment
from .description import describe, remember
from .estimate import dry_run
from .lock import locked
from .presets import find_preset
from .report import write_report
from .results import CellResult
from .run_cell import run_cell
from .settings import ExperimentConfig

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
    """Run the cells that are missing, and write the report.

    `argv` are the arguments that the report names as its command. Raises UserError at the end if
    cells have failed.
    """
    experiment = make_experiment(config)
    if config.dry_run:
        print(dry_run(experiment))
        return

    started = time.perf_counter()
    transformers.utils.logging.disable_progress_bar()  # each cell loads its models four times
    experiment.test_items  # noqa: B018  missing images are told before anything is written
    with locked(experiment.output):
        remember(describe(config, experiment, argv), experiment.output)
        failed = run_cells(experiment)
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


def run_cells(experiment: Experiment) -> list[str]:
    """Run the cells that are missing, and print a line for each; returns the failures.

    The report is written on the way, also when the user interrupts.
    """
    cells, failed, reported = experiment.cells(), [], time.monotonic()
    try:
        for number, cell in enumerate(cells, start=1):
            result = run_cell(experiment, cell)
            if result.error:
                failed.append(f"{cell}: {result.error}")
            print(f"[{number}/{len(cells)}] {cell}: {_result_line(result)}", flush=True)
            if time.monotonic() - reported > REPORT_SECONDS:
                write_report(experiment.output)
                reported = time.monotonic()
    except KeyboardInterrupt as stopped:
        write_report(experiment.output)
        number = stopped.number if isinstance(stopped, Stopped) else signal.SIGINT
        raise Stopped(number, "stopped: run the command again to go on") from stopped
    return failed


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
