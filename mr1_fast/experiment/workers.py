"""Further processes that run cells beside the first one, each with one thread.

They are started by the command itself, on a CPU with a built-in model, whose small operations gain
little from a second thread. They print nothing: failures stand in their cells' failed.json. They
end with the first process, also when that is killed.
"""

import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from typing import IO

import torch

from .. import torchrun
from ..errors import printable, stops_at_once
from ..model.device import resolve_device
from ..processes import module_process
from ..profiles import BUILT_IN
from .cells import Experiment
from .sharing import can_share

MOST = 8
"""The most cells at a time that nobody has asked for: each takes about 0.9 GB of memory."""

GRACE = 60.0
"""Seconds that a process has to save its step and to end."""


def at_a_time(experiment: Experiment, processes: int | None = None) -> int:
    """Return how many cells this command runs at a time, as long as so many are left.

    `processes` is the user's choice. Without one they are as many as torch has threads, where a
    cell needs no more than one, and at most `MOST`.
    """
    if torchrun.size() > 1:
        return 1
    if processes is None:
        device = resolve_device(experiment.settings(experiment.cells()[0])).type
        is_small = device == "cpu" and experiment.model in BUILT_IN
        processes = min(MOST, torch.get_num_threads()) if is_small else 1
    return processes


def needed(experiment: Experiment, processes: int) -> int:
    """Return how many of so many processes are needed beside this one for the cells that are left.

    There are none where the file system has no locks, which it prints.
    """
    if not can_share(experiment.output):
        print(f"{experiment.output} has no locks: run no other command in it at the same time.")
        return 0
    folders = [cell.folder(experiment.output) for cell in experiment.cells()]
    left = sum(not (folder / "cell.json").exists() for folder in folders)
    return max(0, min(processes, left) - 1)


class Workers:
    """The processes that were started, and those of them that have died."""

    def __init__(self, count: int, arguments: Sequence[str]):
        self.running: list[tuple[subprocess.Popen, IO[bytes]]] = []
        """Each with the file of what it says on stderr."""
        try:
            for _ in range(count):
                errors = tempfile.TemporaryFile()  # noqa: SIM115  as long as the process lives
                self.running.append((_started(arguments, errors), errors))
        except OSError as error:
            print(f"fewer cells run at a time: no process can be started ({error.strerror}).")

    def tell_deaths(self) -> None:
        """Print a sentence for each process that has failed since the last call."""
        for process, errors in self.running:
            if process.poll():
                why = _last_line(errors) or f"exit status {process.returncode}"
                why = f"signal {-process.returncode}" if process.returncode < 0 else why
                print(f"a process has died ({printable(why)}): another runs its cell.", flush=True)
        self.running = [each for each in self.running if each[0].poll() is None]

    def end(self, seconds: float) -> None:
        """Stop all that still run, and kill those that have not ended after so many seconds."""
        end = time.monotonic() + seconds
        try:
            for process, _ in self.running:
                process.terminate()
            for process, _ in self.running:
                with suppress(subprocess.TimeoutExpired):
                    process.wait(max(0.0, end - time.monotonic()))
        finally:
            for process, _ in self.running:
                process.kill()
                process.wait()


@contextmanager
def workers(count: int, arguments: Sequence[str]) -> Iterator[Workers]:
    """Have `count` processes run cells within a block, by the `arguments` of worker.py."""
    started, seconds = Workers(count, arguments), GRACE
    try:
        yield started
    except BaseException as error:
        seconds = 0.0 if stops_at_once(error) else GRACE
        raise
    finally:
        started.end(seconds)


def _started(arguments: Sequence[str], errors: IO[bytes]) -> subprocess.Popen:
    command, environment = module_process("mr1_fast.experiment.worker", *arguments)
    if not sys.flags.safe_path:  # rewards may be modules in the current folder
        command.remove("-P")
    return subprocess.Popen(
        command,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=errors,
        env={**environment, "OMP_NUM_THREADS": "1"},
        # Ctrl-C is for the first process alone, which then ends these.
        start_new_session=True,
    )


def _last_line(errors: IO[bytes]) -> str:
    errors.seek(0)
    lines = errors.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""
