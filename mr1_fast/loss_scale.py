"""The loss scale of float16, which keeps small gradients from vanishing and large ones finite."""

from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch

from .types import PackedBatch

LARGEST = 2.0**16
"""The scale at the start, and the largest."""
GOOD_STEPS = 200
"""After how many finite steps in a row the scale doubles."""
SCALED = ("token_weights", "entropy_weights")
"""The data of rows that a loss is linear in."""


class LossScale:
    """The factor by which loss and gradients are larger while they are computed in float16.

    Numbers below 6e-8 are 0 in float16, and those above 65,504 are inf. So each step's loss is
    multiplied by a scale, and its gradients are divided by it. The scale halves after a step that
    was not finite, doubles after 200 finite ones in a row, and stays within [1, 2¹⁶]. That is
    the rule of Micikevicius et al. (2018, arXiv 1710.03740). As a power of 2 it rounds nothing.

    >>> scale = LossScale()
    >>> scale.observe(finite=False)
    >>> scale.value
    32768.0
    """

    def __init__(self) -> None:
        self.value = LARGEST
        self.good_steps = 0
        """How many steps in a row were finite since the scale has last changed."""

    def scaled(self, batch: PackedBatch) -> PackedBatch:
        """Return the batch with the weights of its rows multiplied by the scale.

        The loss functions make gradients before `backward`, so scaling the loss would be too late.
        """
        rows = batch.row_data
        larger = {name: rows[name] * self.value for name in SCALED if name in rows}
        return replace(batch, row_data={**rows, **larger})

    def unscale_(self, gradients: Iterable[torch.Tensor]) -> None:
        """Divide gradients by the scale, in place."""
        if gradients := list(gradients):
            torch._foreach_mul_(gradients, 1 / self.value)

    def observe(self, finite: bool) -> None:
        """Change the scale after a step whose loss and gradients were finite, or were not."""
        self.good_steps = self.good_steps + 1 if finite else 0
        if not finite:
            self.value = max(self.value / 2, 1.0)
        elif self.good_steps == GOOD_STEPS:
            self.value, self.good_steps = min(self.value * 2, LARGEST), 0

    def state(self) -> dict[str, float]:
        """Return the scale and the finite steps so far, which depend on every step."""
        return {"value": self.value, "good_steps": self.good_steps}

    def load(self, state: Mapping[str, float]) -> None:
        """Go on with the scale of a checkpoint; raises ValueError for one that cannot be."""
        value, good_steps = state.get("value"), state.get("good_steps")
        if not isinstance(value, float) or not 1 <= value <= LARGEST:
            raise ValueError(f"the loss scale is {value!r}")
        if type(good_steps) is not int or not 0 <= good_steps < GOOD_STEPS:
            raise ValueError(f"the finite steps of the loss scale are {good_steps!r}")
        self.value, self.good_steps = value, good_steps
