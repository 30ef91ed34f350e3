"""The folder of a run: its name, the lock of whoever trains there, and what may lie in it before.

A training holds the folder from before it writes anything until its end, so that two of them never
mix. The lock dies with its process.
"""

import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path

from .config import TrainConfig
from .distributed import World
from .errors import UserError
from .files import LOCK, exclusive, is_no_folder, require_file
from .resuming import CONFIG, can_begin_again, has_checkpoint, resume_command

BEFORE_THE_FIRST = {
    *(CONFIG, "processes.json", "memory.json", "evaluation.json", "images", "completions.jsonl"),
    *("evaluations.jsonl", "best", "report.html", "completions.html"),
    *("loggers.json", "tensorboard", "wandb", "trackio", "mlflow.db", "mlartifacts"),
}
"""Names that a run may leave if it fails before its first step; they may be overwritten."""
BEFORE_A_CHECKPOINT = {"metrics.jsonl", "checkpoints"}
"""What else there is of a run that was ended before its first checkpoint was whole."""


FILES = ("finished.json", "processes.json", "report.html", "completions.html")
"""Files of a run that are written, and not read, before or after training."""
FOLDERS = ("checkpoints", "best", "images", "final")
"""Folders of a run."""


def run_folder(config: TrainConfig) -> Path:
    """Return the run folder; without --output its name says time, task, algorithm and seed."""
    if config.output is None:
        stamp = time.strftime("%Y%m%d-%H%M%S")
        config.output = str(Path("runs") / f"{stamp}-{config.task}-{config.algo}-seed{config.seed}")
    return Path(config.output)


@contextmanager
def hold_run_folder(config: TrainConfig, world: World) -> Iterator[None]:
    """Keep every other training out of the run folder, which is made, within a block.

    Without --output, the folder is one that no other run has. The first process holds it for all.
    Where nothing was written to it, it is removed again. Raises UserError in all processes where
    another training is at work there, or the folder cannot be made.
    """
    with ExitStack() as stack:

        def hold() -> str | None:
            return stack.enter_context(_held(config)) if world.is_first else None

        config.output = world.of_first(world.in_all(hold))
        yield


@contextmanager
def _held(config: TrainConfig) -> Iterator[str]:
    is_named = config.output is not None
    folder = run_folder(config)
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output {folder} is no folder: choose another.")
    _require_own_names(folder)
    made = [each for each in (folder, *folder.parents) if not each.exists()]
    if not is_named:
        folder = _new_folder(folder)
        made = [folder, *(each for each in made if each in folder.parents)]
    taken = f"output {folder} is in use by another training: wait for its end, or choose another."
    try:
        with exclusive(folder, taken):
            yield str(folder)
    finally:
        with suppress(OSError):  # it holds something by now
            for each in made:
                each.rmdir()


def _require_own_names(folder: Path) -> None:
    """Raise UserError where something else has the name of a file or a folder of the run.

    It would be found when that is written, at the latest after training; a pipe never ends that.
    """
    for name in FILES:
        require_file(folder / name)
    for name in FOLDERS:
        if is_no_folder(folder / name):
            raise UserError(f"{folder / name} is no folder: move it away.")


def _new_folder(folder: Path) -> Path:
    """Make a folder of this name, or with a number behind it, that nobody else has made."""
    if folder.parent.exists() and not folder.parent.is_dir():
        raise UserError(f"{folder.parent} is no folder: name one for the run with --output.")
    new, number = folder, 1
    while True:
        try:
            new.parent.mkdir(parents=True, exist_ok=True)
            new.mkdir()
            return new
        except FileExistsError:
            number += 1
            new = folder.with_name(f"{folder.name}-{number}")
        except FileNotFoundError:  # another run that could not begin has just removed the parent
            continue
        except OSError as error:
            raise UserError(
                f"output {new} cannot be written ({error.strerror}): choose another with --output."
            ) from error


def require_room(folder: Path, begins_again: bool) -> None:
    """Raise UserError where a run that begins in a folder would spoil what is there.

    What a run has left that ended before its first step may be overwritten, and where a run
    `begins_again`, what it has left before its first checkpoint. What a process that was killed had
    half written, or had left for others to see, does not count.
    """
    if folder.exists() and not folder.is_dir():
        raise UserError(f"output {folder} is no folder: choose another.")
    if not folder.exists():
        return
    found = {
        path.name
        for path in folder.iterdir()
        if path.name != LOCK and not path.match(".*.partial") and not path.match(".seen-by-all-*")
    }
    # Since the settings were read, another process may have come to its first checkpoint.
    begins_again = begins_again and not has_checkpoint(folder)
    if not found - BEFORE_THE_FIRST - (BEFORE_A_CHECKPOINT if begins_again else set()):
        return
    way_out = "choose a new folder"
    of_a_run = not found - BEFORE_THE_FIRST - BEFORE_A_CHECKPOINT
    if has_checkpoint(folder):
        way_out += f", or go on with its run by {resume_command(folder)}"
    elif of_a_run and can_begin_again(folder):
        way_out += f", or begin its run again by {resume_command(folder)}"
    raise UserError(f"output {folder} is not empty: {way_out}.")
