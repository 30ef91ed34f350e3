"""Groups without a signal: what `--skip-equal-groups` leaves out, and what it samples instead.

A group whose rewards are all equal has no advantages. DAPO (arXiv 2503.14476, section 3.2) samples
further prompts until a step is full of groups that have some.
"""

import math

import torch

from .advantages import equal_groups
from .log import Stopwatch
from .rewards import Scores
from .run import Run
from .stages import sample, score_rollout
from .types import Rollout

ROUNDS = 3
"""How many rounds of further prompts a step may sample at most; DAPO's and verl's scripts allow 10
rounds in all, and end the run after them."""


def refill(
    run: Run, rollout: Rollout, scores: Scores, step: int, clock: Stopwatch
) -> tuple[Rollout, Scores]:
    """Sample and score further prompts until as many groups have a signal as the step has prompts.

    Returns all that the step has sampled: `rollout` and `scores`, and after them those of up to
    ROUNDS further rounds. A round has as many prompts as are expected to give the groups that are
    missing, and at most those of a step, so it needs no more memory. What a round may draw depends
    on the seed, the step and the round alone.
    """
    clock.lap("reward")
    wanted = len(rollout.examples)
    for round_ in range(1, ROUNDS + 1):
        found = int((~equal_groups(scores.total)).sum())
        if found >= wanted:
            break
        start = (step * ROUNDS + round_ - 1) * wanted
        examples = run.source.take_more(start, _prompts(wanted, found, len(scores.total)))
        further = sample(run, examples, step, round_=round_)
        clock.lap("rollout")
        scores = _joined_scores(scores, score_rollout(run, further, step))
        rollout = _joined_rollout(rollout, further)
        clock.lap("reward")
    return rollout, scores


def groups_with_signal(
    rollout: Rollout, rewards: torch.Tensor, limit: int
) -> tuple[Rollout, torch.Tensor]:
    """Return the first groups, up to `limit`, whose rewards differ, and their rewards.

    `rewards` is (B, G); there may be none, and then both are empty.
    """
    chosen = (~equal_groups(rewards)).nonzero().flatten().tolist()[:limit]
    return _selected(rollout, chosen), rewards[chosen]


def _prompts(wanted: int, found: int, sampled: int) -> int:
    """Return how many prompts should give the groups that are missing, at the share seen so far."""
    return min(wanted, math.ceil((wanted - found) * sampled / max(1, found)))


def _selected(rollout: Rollout, groups: list[int]) -> Rollout:
    """Return the rollout of some of the prompts, by their indices."""
    size = rollout.num_generations
    rows = [group * size + i for group in groups for i in range(size)]
    return Rollout(
        examples=[rollout.examples[group] for group in groups],
        prompts=[rollout.prompts[group] for group in groups],
        completions=[rollout.completions[row] for row in rows],
        texts=[rollout.texts[row] for row in rows],
        reasons=[rollout.reasons[row] for row in rows],
        logprobs=[rollout.logprobs[row] for row in rows],
        num_generations=size,
    )


def _joined_rollout(first: Rollout, second: Rollout) -> Rollout:
    return Rollout(
        examples=first.examples + second.examples,
        prompts=first.prompts + second.prompts,
        completions=first.completions + second.completions,
        texts=first.texts + second.texts,
        reasons=first.reasons + second.reasons,
        logprobs=first.logprobs + second.logprobs,
        num_generations=first.num_generations,
    )


def _joined_scores(first: Scores, second: Scores) -> Scores:
    return Scores(
        total=torch.cat([first.total, second.total]),
        parts={name: values + second.parts[name] for name, values in first.parts.items()},
        why=first.why + second.why,
    )
