"""The completions and rewards of a step as one, of all its rounds and of all processes."""

from dataclasses import replace
from itertools import accumulate, pairwise

import torch

from .distributed import World
from .distributed.world import in_order
from .rewards import Scores
from .stopwatch import Stopwatch
from .types import Rollout


def together(
    world: World, rollout: Rollout, scores: Scores, clock: Stopwatch
) -> tuple[Rollout, Scores]:
    """Put together what all processes have sampled and scored, in the order of one process's step.

    Every process gets all groups, and of those of others no prompt, no image and no extra column.
    The `clock` notes how long it waits for the slowest one.
    """
    if world.size == 1:
        return rollout, scores
    clock.lap("reward")
    light = replace(
        rollout,
        examples=[replace(each, images=(), extra={}) for each in rollout.examples],
        prompts=[None] * len(rollout.prompts),
    )
    parts = world.gather((light, scores))
    clock.waited()
    parts[world.rank] = rollout, scores
    rollouts, all_scores = zip(*parts, strict=True)

    ends = list(accumulate(len(part.examples) for part in rollouts))
    order = in_order([range(*ends) for ends in pairwise([0, *ends])])
    return selected(joined(*rollouts), order), selected_scores(joined_scores(*all_scores), order)


def joined(*rollouts: Rollout) -> Rollout:
    """Put rollouts with the same G one behind the other."""
    lists = ("examples", "prompts", "completions", "texts", "reasons", "logprobs")
    whole = {name: [x for each in rollouts for x in getattr(each, name)] for name in lists}
    return Rollout(**whole, num_generations=rollouts[0].num_generations)


def joined_scores(*scores: Scores) -> Scores:
    """Put the scores of such rollouts one behind the other."""
    parts = {name: [v for each in scores for v in each.parts[name]] for name in scores[0].parts}
    why = [reason for each in scores for reason in each.why]
    return Scores(torch.cat([each.total for each in scores]), parts, why)


def selected(rollout: Rollout, groups: list[int]) -> Rollout:
    """Return some of a rollout's groups, by their numbers, in this order."""
    rows = _rows(groups, rollout.num_generations)
    return Rollout(
        examples=[rollout.examples[group] for group in groups],
        prompts=[rollout.prompts[group] for group in groups],
        completions=[rollout.completions[row] for row in rows],
        texts=[rollout.texts[row] for row in rows],
        reasons=[rollout.reasons[row] for row in rows],
        logprobs=[rollout.logprobs[row] for row in rows],
        num_generations=rollout.num_generations,
    )


def selected_scores(scores: Scores, groups: list[int]) -> Scores:
    """Return the scores of some groups, by their numbers, in this order."""
    rows = _rows(groups, scores.total.shape[1])
    parts = {name: [values[row] for row in rows] for name, values in scores.parts.items()}
    return Scores(scores.total[groups], parts, [scores.why[row] for row in rows])


def _rows(groups: list[int], size: int) -> list[int]:
    return [group * size + index for group in groups for index in range(size)]
