"""What `--resume auto` finds in the folder that --output names: nothing yet, a run that goes on
from its last checkpoint, or one that is finished."""

import json
import re
import shlex
from pathlib import Path

from .config import TrainConfig
from .errors import UserError
from .files import write_json

FINISHED = "finished.json"
"""The file in a run's folder that is written last. Times of files tell little: clocks jump."""
AUTO = "auto"
"""The value of `--resume` that continues the run in --output, or begins there."""


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


def started_before(output: str | None) -> str | None:
    """Return the folder that --resume auto continues; None where a run must begin there."""
    if output is None:
        raise UserError(
            "resume is auto, but there is no output: name the run's folder with --output."
        )
    return output if saved_steps(Path(output) / "checkpoints") else None


def note_finished(config: TrainConfig) -> None:
    """Note in the run's folder that all of its steps are done, and what is written after them."""
    write_json(Path(config.output) / FINISHED, {"steps": config.steps}, "make room there")


def finished(config: TrainConfig) -> str:
    """Say where the results of a run are that has nothing left to do; "" where there is some.

    Its last checkpoint is that of the last step, and the run has noted that all was written after
    it: what there is could be that of fewer steps, before --steps was raised. Earlier versions have
    noted nothing; there, the evaluation and the card of final/ must be newer than the checkpoint.
    """
    run = Path(config.output)
    last = step_folder(run / "checkpoints", config.steps)
    rest = [run / "final" / "README.md", *[run / "evaluation.json"] * bool(config.eval_samples)]
    if not all(path.exists() for path in (last, *rest)):
        return ""
    if (run / FINISHED).exists():
        if not _is_noted(run / FINISHED, config.steps):
            return ""
    elif any(path.stat().st_mtime < last.stat().st_mtime for path in rest):
        return ""
    push = ""
    if config.push_to_hub is not None:
        push = f" · `python -m mr1_fast.push {shlex.quote(str(run))}` uploads it again"
    return (
        f"the run is finished, with all of its {config.steps} steps: {run / 'final'} · "
        f"report {run / 'report.html'}{push}"
    )


def _is_noted(path: Path, steps: int) -> bool:
    """Say whether a run has noted that it is finished after `steps`; a damaged note is none."""
    try:
        return json.loads(path.read_bytes()) == {"steps": steps}
    except (OSError, ValueError):
        return False
