"""Scoring completions: the weighted sum of the named rewards."""

import math

import torch

from ..errors import UserError
from ..types import Example
from .registry import RewardFunction, find_reward, require_rewards


def score(
    completions: list[str], examples: list[Example], weights: dict[str, float]
) -> tuple[torch.Tensor, dict[str, list[float]]]:
    """Compute the weighted sum of the named rewards for B examples with G completions each.

    `completions` has B·G texts; text i belongs to example i // G. `weights` maps the names of
    rewards to their weights; a reward of weight 0 is computed too, for the log. Returns the sums,
    (B, G) float32, and each reward's B·G values by its name. Raises UserError for an unknown name,
    and for a function that raises or returns anything but a finite number.
    """
    if not examples or len(completions) % len(examples):
        raise ValueError(
            f"{len(completions)} completions cannot be shared out evenly among "
            f"{len(examples)} examples."
        )
    require_rewards(weights)

    group_size = len(completions) // len(examples)
    values = {}
    for name in weights:
        function = find_reward(name)
        values[name] = [
            _value(name, function, completion, examples[i // group_size])
            for i, completion in enumerate(completions)
        ]

    total = torch.zeros(len(completions), dtype=torch.float64)
    for name, weight in weights.items():
        total += weight * torch.tensor(values[name], dtype=torch.float64)
    return total.float().view(len(examples), group_size), values


def _value(name: str, function: RewardFunction, completion: str, example: Example) -> float:
    """Return one reward of one completion, checked: a single NaN would spoil every weight."""
    try:
        value = function(completion, example)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"The reward {name!r} (function {function.__qualname__}) raised "
            f"{type(error).__name__}: {error}"
        ) from error

    try:
        # Texts have no __float__, though float() would read a number in them.
        number = float(value) if hasattr(value, "__float__") else math.nan
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    if not abs(number) <= torch.finfo(torch.float32).max:
        raise UserError(
            f"The reward {name!r} (function {function.__qualname__}) must return a finite number, "
            f"not {value!r:.200}"
        )
    return number
