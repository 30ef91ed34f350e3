"""A run as its loggers see it: steps with known metrics and completions, without any model."""

from collections.abc import Sequence
from pathlib import Path

import torch

from mr1_fast.config import TrainConfig
from mr1_fast.log import RunLog
from mr1_fast.rewards import Scores
from mr1_fast.tasks.data import load_examples
from mr1_fast.types import Rollout

HOSTILE = "<script>alert(1)</script> | *5*\n<answer> 5 </answer>"


def rollout_of(step: int) -> tuple[Rollout, Scores]:
    """Two prompts with two completions each, of which the second has the higher reward."""
    texts = [HOSTILE, "<answer> 4 </answer>"] * 2
    values = [0.0, 1.0] * 2
    rollout = Rollout(
        examples=load_examples("counting", "drawn", "train", 0).take(step, 2),
        prompts=[],
        completions=[torch.tensor([1])] * 4,
        texts=texts,
        reasons=["eos"] * 4,
        logprobs=[],
        num_generations=2,
    )
    scores = Scores(torch.tensor(values).view(2, 2), {"accuracy": values}, ["no", "yes"] * 2)
    return rollout, scores


def metrics_of(step: int) -> dict[str, float]:
    """Metrics of a step; the second is a reward that is named by its file."""
    return {"loss": 0.5 + step, "/home/me/../mine.py:brief": float(step)}


def log_steps(
    folder: Path, logger: str, first: int, last: int, evaluate: Sequence[int] = (), **settings
) -> None:
    """Log the steps from `first` on, before `last`, as a run does; it is resumed if first > 0.

    evaluate: after how many steps there is an evaluation; 0 is that before training.
    """
    resume = str(folder) if first else None
    log = RunLog(
        TrainConfig(output=str(folder), steps=4, loggers=[logger], resume=resume, **settings)
    )
    log.create(first)
    if 0 in evaluate:
        log.evaluation({"step": 0, "accuracy": 0.5})
    log.start(first)
    for step in range(first, last):
        log.completions(step, *rollout_of(step))
        log.step(step, metrics_of(step))
        if step + 1 in evaluate:
            log.evaluation({"step": step + 1, "accuracy": 0.5})
    log.close()
