"""Scoring completions: the weighted sum of the named rewards."""

from dataclasses import dataclass
from typing import Any

import torch

from ..types import Example
from .accuracy import CompletionJudge, judge_completion
from .functions import Batch
from .math_check import time_of_a_step
from .registry import find_reward
from .running import Job, Values, run_jobs

SECONDS = 300.0
"""How long a reward function may take for the completions of a step, unless told otherwise."""


@dataclass
class Scores:
    """The rewards of B·G completions; completion i belongs to example i // G."""

    total: torch.Tensor
    """(B, G) float32: the weighted sums, in which None counts 0."""
    parts: dict[str, Values]
    """B·G values of each reward by its name; None where it says nothing about a completion."""
    why: list[str]
    """B·G reasons of the accuracy judge; empty texts where accuracy is not rewarded."""

    def with_part(self, name: str, values: list[float]) -> "Scores":
        """Return the scores with one more part of B·G values, which are added to the totals."""
        added = torch.tensor(values).view_as(self.total)
        return Scores(self.total + added, {**self.parts, name: values}, self.why)

    def means(self) -> dict[str, float]:
        """Return the mean of each reward over the completions that it says something about.

        A reward that says nothing at all has no mean.
        """
        known = {name: [v for v in values if v is not None] for name, values in self.parts.items()}
        return {name: sum(values) / len(values) for name, values in known.items() if values}


def score(
    completions: list[str],
    examples: list[Example],
    weights: dict[str, float],
    accuracy: CompletionJudge = judge_completion,
    seconds: float = SECONDS,
    completion_ids: list[list[int]] | None = None,
    trainer_state: Any = None,
) -> Scores:
    """Compute the weighted sum of the named rewards for B examples with G completions each.

    `completions` has B·G texts; text i belongs to example i // G. `weights` maps the names of
    rewards to their weights; a reward of weight 0 is computed too, for the log. `accuracy` judges
    completions for the reward of that name. The functions run at the same time, each for at most
    `seconds`. `completion_ids` and `trainer_state` are passed on to functions of TRL's form.

    Raises UserError for an unknown name, and for a function that raises, does not end in time, or
    returns anything but finite numbers.
    """
    if not examples or len(completions) % len(examples):
        raise ValueError(
            f"{len(completions)} completions cannot be shared out evenly among "
            f"{len(examples)} examples."
        )
    why: list[str] = []

    def accuracy_reward(completion: str, example: Example) -> float:
        verdict = accuracy(completion, example.solution)
        why.append(verdict.why)
        return float(verdict.right)

    functions = {name: find_reward(name) for name in weights}
    if "accuracy" in weights:
        functions["accuracy"] = accuracy_reward
    batch = Batch(completions, examples, completion_ids, trainer_state)
    jobs = [Job(name, function, batch) for name, function in functions.items()]
    with time_of_a_step():
        parts = run_jobs(jobs, seconds)

    total = torch.zeros(len(completions), dtype=torch.float64)
    for name, weight in weights.items():
        known = [0.0 if value is None else value for value in parts[name]]
        total += weight * torch.tensor(known, dtype=torch.float64)
    total = total.float().view(len(examples), batch.group_size)
    return Scores(total, parts, why or [""] * len(completions))
