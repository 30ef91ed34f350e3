"""Which process runs which cell of an experiment: any that finds it free, by the cell's lock.

Any number of processes may work in an experiment's folder, however they were started. Each runs the
cells that are neither finished nor run by another one, and then waits until all have ended: the
system frees the lock of a process that dies, and a waiting one takes its cell over.

Where the file system has no locks, one command must work there alone; the processes of torchrun
then have every n-th cell each.
"""

import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from .. import torchrun
from ..files import remove_folder
from ..locks import has_locks, if_free
from .cells import AGAIN, Cell, Experiment
from .run_cell import run_cell

LOOK_SECONDS = 0.5
"""How long a process that finds no free cell waits before it looks again."""


def can_share(output: Path) -> bool:
    """Return whether processes can share the cells of the experiment in `output` by locks."""
    return has_locks(output / "experiment.json", AGAIN)


def call_moment(output: Path) -> int:
    """Return the moment at which experiment.json was written last, by the clock of its disk.

    A cell has failed in this call if its failure was recorded later.
    """
    return (output / "experiment.json").stat().st_mtime_ns


def run_cells(experiment: Experiment, began: int, tell: Callable[[list[Cell]], None]) -> None:
    """Run free cells until all have ended, in this process or in others.

    began: what `call_moment` has returned as the call began, the same in all its processes.
    tell: called again and again, with the cells that have ended since.
    """
    left = dict(enumerate(in_order(experiment)))
    mine = range(len(left))
    if not can_share(experiment.output):
        mine = mine[torchrun.rank() :: torchrun.size()]
    while left:
        ended = [n for n, cell in left.items() if has_ended(experiment, cell, began)]
        tell([_tidied(experiment, left.pop(n)) for n in ended])
        has_run = any(_run_if_free(experiment, left[n], began) for n in mine if n in left)
        if left and not has_run:
            time.sleep(LOOK_SECONDS)


def in_order(experiment: Experiment) -> list[Cell]:
    """Return the cells in the order in which they are begun: seed by seed.

    The base model of a seed, with which its start is made, comes before what is trained from the
    seed before: nobody has to wait for a start while other cells are left.
    """
    places = {seed: place for place, seed in enumerate(experiment.seeds)}

    def key(cell: Cell) -> tuple[int, bool]:
        is_trained = cell.trained is not None
        return places[cell.seed] - (not is_trained), is_trained

    return sorted(experiment.cells(), key=key)


def has_ended(experiment: Experiment, cell: Cell, began: int) -> bool:
    """Return whether a cell is finished, or has failed since the moment `began`."""
    folder = cell.folder(experiment.output)
    with suppress(FileNotFoundError):
        files = {path.name for path in folder.iterdir()}  # NFS looks again only where it lists
        if "cell.json" in files:
            return True
        if "failed.json" in files:
            return (folder / "failed.json").stat().st_mtime_ns >= began
    return False


def _run_if_free(experiment: Experiment, cell: Cell, began: int) -> bool:
    """Run a cell, unless another process does, or makes the start that it needs."""
    if has_ended(experiment, cell, began) or experiment.waits_for_start(cell.seed):
        return False
    with if_free(cell.folder(experiment.output), AGAIN) as is_free:
        if not is_free or has_ended(experiment, cell, began):
            return False
        run_cell(experiment, cell)
    return True


def _tidied(experiment: Experiment, cell: Cell) -> Cell:
    """Remove the checkpoints of a finished cell, also where the process that ran it was killed."""
    checkpoints = experiment.run_folder(cell) / "checkpoints"
    if (cell.folder(experiment.output) / "cell.json").exists() and checkpoints.exists():
        remove_folder(checkpoints)
    return cell
