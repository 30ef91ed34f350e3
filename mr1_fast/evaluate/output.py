"""What an evaluation may overwrite: what an earlier one has written, and nothing else."""

import json
from pathlib import Path

from ..errors import UserError

OF_THIS_COMMAND = {"accuracy", "results"}
"""Entries of every file that the command writes, in its own layout and in R1-V's."""


def require_replaceable(name: str, path: Path) -> None:
    """Raise UserError where the setting `name` names a file that must not be overwritten.

    Those are the records of a run, which has its own evaluation.json, and whatever else this
    command has not written. A device or a pipe may be written to.
    """
    if path.is_dir():
        raise UserError(f"{name} is {path}, which is a folder: name a file in it.")
    if path.name == "evaluation.json" and _is_run(path.parent):
        raise UserError(
            f"{name} is {path}, which is where the run in that folder keeps its own evaluation: "
            f"choose another file with --{name.replace('_', '-')}."
        )
    if path.is_file() and path.stat().st_size and not _is_evaluation(path):
        raise UserError(
            f"{name} is {path}, which no evaluation has written: choose another file with "
            f"--{name.replace('_', '-')}."
        )


def _is_run(folder: Path) -> bool:
    of_a_run = ("metrics.jsonl", "checkpoints", "final")
    return (folder / "config.yaml").exists() and any((folder / n).exists() for n in of_a_run)


def _is_evaluation(path: Path) -> bool:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.keys() >= OF_THIS_COMMAND
