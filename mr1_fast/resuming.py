"""What `--resume` finds in a folder: nothing yet, a run that goes on from its last checkpoint, one
that ended before its first, or one that is finished."""

import json
import re
import shlex
from pathlib import Path
from typing import Any

from .config import TrainConfig
from .errors import UserError, shortened
from .files import write_json, write_text
from .settings_file import dump_yaml

FINISHED = "finished.json"
"""The file in a run's folder that is written last. Times of files tell little: clocks jump."""
AUTO = "auto"
"""The value of `--resume` that continues the run in --output, or begins there."""
CONFIG = "config.yaml"
"""The file in a run folder that has the settings of the run."""

FIRST_LINE = "# All settings of this run. A file without its last line is not whole."
LAST_LINE = "# The end."
LAST_SETTING = "loggers"
"""The setting that every version has written last; the earlier ones without the two lines."""


class AutoResumed(str):
    """The folder that `--resume auto` continues: from the newest checkpoint that is not damaged."""


def step_folder(folder: Path, step: int) -> Path:
    """Return the folder of the checkpoint after `step` steps, for example `folder/step-000050`."""
    return folder / f"step-{step:06d}"


def saved_steps(folder: Path) -> list[int]:
    """Return the steps of the checkpoints in `folder`, in order, or of the weights kept there."""
    paths = [
        path for path in folder.glob("step-*") if re.fullmatch(r"step-\d{6,}", path.name, re.A)
    ]
    steps = {int(path.name.removeprefix("step-")): path for path in paths if path.is_dir()}
    return sorted(step for step, path in steps.items() if step_folder(folder, step) == path)


def has_checkpoint(run: Path) -> bool:
    """Return whether a run folder has a checkpoint, which may be damaged."""
    return bool(saved_steps(run / "checkpoints"))


def started_before(output: str | None) -> str | None:
    """Return the folder that --resume auto continues; None where a run must begin there."""
    if output is None:
        raise UserError(
            "resume is auto, but there is no output: name the run's folder with --output."
        )
    return output if has_checkpoint(Path(output)) else None


def write_config(config: object, path: Path, way_out: str = "choose another folder") -> None:
    """Write a run's settings as YAML that `--config` reads back, unless the file has them already.

    Raises UserError, which ends with `way_out`, where that fails; the file is then as it was.
    """
    text = dump_yaml(saved_settings(config))
    text = f"{FIRST_LINE}\n{text}{LAST_LINE}\n"
    try:
        is_there = path.read_text(encoding="utf-8", errors="replace") == text
    except OSError:
        is_there = False
    if not is_there:
        write_text(path, text, way_out)


def saved_settings(config: object) -> dict[str, Any]:
    """Return the settings that a run is known by, by name.

    `resume` is left out: it says how one process began, and not what the run is.
    """
    return {name: value for name, value in vars(config).items() if name != "resume"}


def settings_file(run: str) -> Path:
    """Return the config.yaml of the run folder that `--resume` names.

    Raises UserError where there is none, and where its end is missing: what a setting has lost
    would count as its default.
    """
    path = Path(run) / CONFIG
    if not path.is_file():
        raise UserError(
            f"resume is {shortened(run, 200)}, but there is no {shortened(path, 200)}: name "
            "the folder of an earlier run."
        )
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError as error:
        raise UserError(
            f"config {path} cannot be read ({error.strerror}): check its permissions."
        ) from error
    if not _is_whole(text):
        raise UserError(
            f"config {path} is damaged, since its end is missing: bring it back from a copy, or "
            "begin another run with a new --output."
        )
    return path


def can_begin_again(run: Path) -> bool:
    """Return whether `--resume` begins a run again that ended before its first checkpoint."""
    try:
        return not has_checkpoint(run) and bool(settings_file(str(run)))
    except UserError:
        return False


def _is_whole(text: str) -> bool:
    if text.startswith(FIRST_LINE):
        return f"\n{LAST_LINE}\n" in text  # a line of the user's may stand below it
    return text.endswith("\n") and bool(re.search(rf"^{LAST_SETTING}:", text, re.MULTILINE))


def resume_command(run: Path, starter: str = "python") -> str:
    """Return the command by which the run in a folder goes on, or begins again."""
    return f"`{starter} -m mr1_fast.train --resume {shlex.quote(str(run))}`"


def note_finished(config: TrainConfig) -> None:
    """Note in the run's folder that all of its steps are done, and what is written after them."""
    write_json(Path(config.output) / FINISHED, {"steps": config.steps}, "make room there")


def finished(config: TrainConfig) -> str:
    """Say where the results of a run are that has nothing left to do; "" where there is some.

    The run has noted that all was written: what there is could be that of fewer steps, before
    --steps was raised. Earlier versions have noted nothing; there, the last checkpoint is that of
    the last step, and the evaluation and the card of final/ must be newer than it.
    """
    run = Path(config.output)
    rest = [run / "final" / "README.md", *[run / "evaluation.json"] * bool(config.eval_samples)]
    if not all(path.exists() for path in rest):
        return ""
    if (run / FINISHED).exists():
        if not _is_noted(run / FINISHED, config.steps):
            return ""
    else:
        last = step_folder(run / "checkpoints", config.steps)
        if not last.exists() or any(p.stat().st_mtime < last.stat().st_mtime for p in rest):
            return ""
    push = ""
    if config.push_to_hub is not None:
        push = f" · `python -m mr1_fast.push {shlex.quote(str(run))}` uploads it again"
    return (
        f"the run is finished, with all of its {config.steps} steps: {run / 'final'} · "
        f"report {run / 'report.html'}{push}"
    )


def _is_noted(path: Path, steps: int) -> bool:
    """Say whether a run has noted that it is finished after `steps`, or after more."""
    try:
        return path.is_file() and json.loads(path.read_bytes())["steps"] >= steps
    except (OSError, ValueError, LookupError, TypeError, RecursionError):  # a damaged note is none
        return False
