"""Whole runs in the process of the tests, and runs without data or log for a single stage."""

import json
import shutil
from pathlib import Path

import pytest

from mr1_fast import train
from mr1_fast.command_line import parse_train_config
from mr1_fast.config import TrainConfig
from mr1_fast.distributed import SINGLE
from mr1_fast.model.policy import Policy
from mr1_fast.plan.out_of_memory import PACK_TOKENS, ROLLOUT_CACHE, MemoryLimits
from mr1_fast.report import plots
from mr1_fast.run import Run


def run(argv: list[str], figures: bool = False) -> None:
    """Do what `python -m mr1_fast.train` does; raises UserError where that exits.

    Without `figures` the report has its text, but no plots: on a CPU, they take longer to draw than
    a tiny model to train.
    """
    with pytest.MonkeyPatch.context() as patch:
        if not figures:
            patch.setattr(plots, "plot_element", lambda *_: "")
        train.main(parse_train_config(argv))


def stage_run(policy: Policy, config: TrainConfig, tokens: int = 10**6, said=None, **parts) -> Run:
    """A Run whose stages may compute on `tokens` tokens at once; `said` collects what it prints."""
    say = [].append if said is None else said.append
    amounts = {PACK_TOKENS: tokens, ROLLOUT_CACHE: tokens}
    limits = MemoryLimits(say, lambda: "Change X.", amounts, parts.get("world", SINGLE))
    return Run(config=config, policy=policy, limits=limits, **parts)


def metrics(folder: Path) -> list[dict]:
    """What each step of a run measured, but for times and speed."""
    return records(folder / "metrics.jsonl", timed=("seconds", "tflops"))


def curve(folder: Path) -> list[dict]:
    """The evaluations of a run on the way, but for their times."""
    return records(folder / "evaluations.jsonl", timed=("seconds",))


def records(path: Path, timed: tuple[str, ...] = ()) -> list[dict]:
    """The lines of a file of JSON objects, without what `timed` begins the name of."""
    lines = path.read_text(encoding="utf-8").splitlines()
    return [
        {name: value for name, value in json.loads(line).items() if not name.startswith(timed)}
        for line in lines
    ]


def assert_same_run(folder: Path, expected: Path) -> None:
    """All that two finished runs have computed is equal, bit for bit."""
    assert metrics(folder) == metrics(expected)
    if (expected / "evaluations.jsonl").exists():
        assert curve(folder) == curve(expected)
    for name in ("final/model.safetensors", "completions.jsonl", "evaluation.json"):
        assert (folder / name).read_bytes() == (expected / name).read_bytes(), name


def interrupt(finished: Path, folder: Path) -> Path:
    """Copy a finished run as if it had been killed before its last checkpoint."""
    shutil.copytree(finished, folder)
    shutil.rmtree(max((folder / "checkpoints").iterdir()))
    shutil.rmtree(folder / "final")
    (folder / "report.html").unlink()
    evaluation = json.loads((folder / "evaluation.json").read_text())
    del evaluation["after"], evaluation["final_step"]
    for shown in evaluation["examples"]:
        del shown["after"]
    (folder / "evaluation.json").write_text(json.dumps(evaluation))
    return folder
