"""What `--resume auto` finds in the folder that --output names: nothing yet, a run that goes on
from its last checkpoint, or one that is finished."""

import shlex
from pathlib import Path

from .config import TrainConfig
from .errors import UserError

AUTO = "auto"
"""The value of `--resume` that continues the run in --output, or begins there."""


def started_before(output: str | None) -> str | None:
    """Return the folder that --resume auto continues; None where a run must begin there."""
    if output is None:
        raise UserError(
            "resume is auto, but there is no output: name the run's folder with --output."
        )
    has_checkpoint = any((Path(output) / "checkpoints").glob("step-*"))
    return output if has_checkpoint else None


def finished(config: TrainConfig) -> str:
    """Say where the results of a run are that has nothing left to do; "" where there is some.

    Its last checkpoint is that of the last step, and what is written after it is newer than it: the
    evaluation, and last the card of final/. They could be those of fewer steps, before --steps was
    raised.
    """
    run = Path(config.output)
    last = run / "checkpoints" / f"step-{config.steps:06d}"
    rest = [run / "final" / "README.md", *[run / "evaluation.json"] * bool(config.eval_samples)]
    if not all(path.exists() for path in (last, *rest)):
        return ""
    if any(path.stat().st_mtime < last.stat().st_mtime for path in rest):
        return ""
    push = ""
    if config.push_to_hub is not None:
        push = f" · `python -m mr1_fast.push {shlex.quote(str(run))}` uploads it again"
    return (
        f"the run is finished, with all of its {config.steps} steps: {run / 'final'} · "
        f"report {run / 'report.html'}{push}"
    )
