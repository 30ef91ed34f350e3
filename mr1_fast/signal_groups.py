"""Groups without a signal: what `--skip-equal-groups` leaves out, and what it samples instead.

A group whose rewards are all equal has no advantages. DAPO (arXiv 2503.14476, section 3.2) samples
further prompts until a step is full of groups that have some.
"""

import math

import torch

from .advantages import equal_groups
from .rewards import Scores
from .run import Run
from .stages import sample, score_rollout
from .stopwatch import Stopwatch
from .types import Rollout
from .whole_step import joined, joined_scores, selected, together

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
    world, wanted = run.world, len(rollout.examples)
    for round_ in range(1, ROUNDS + 1):
        found = int((~equal_groups(scores.total)).sum())
        if found >= wanted:
            break
        start = (step * ROUNDS + round_ - 1) * wanted
        entries = world.share(range(start, start + _prompts(wanted, found, len(scores.total))))
        examples = [example for entry in entries for example in run.source.take_more(entry, 1)]
        further = sample(run, examples, step, round_=round_)
        clock.lap("rollout")
        further, more = together(world, further, score_rollout(run, further, step), clock)
        scores = joined_scores(scores, more)
        rollout = joined(rollout, further)
        clock.lap("reward")
    return rollout, scores


def groups_with_signal(
    rollout: Rollout, rewards: torch.Tensor, limit: int
) -> tuple[Rollout, torch.Tensor]:
    """Return the first groups, up to `limit`, whose rewards differ, and their rewards.

    `rewards` is (B, G); there may be none, and then both are empty.
    """
    chosen = (~equal_groups(rewards)).nonzero().flatten().tolist()[:limit]
    return selected(rollout, chosen), rewards[chosen]


def _prompts(wanted: int, found: int, sampled: int) -> int:
    """Return how many prompts should give the groups that are missing, at the share seen so far."""
    return min(wanted, math.ceil((wanted - found) * sampled / max(1, found)))
