"""Layers that are run again in the backward pass, from their stored input.

A layer's input arrives as (residual, update), and only the sum of the two is stored. It is computed
inside the layer, which hands it over.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

Carry = tuple[Tensor, Tensor | None]
"""A residual (T, D) and an update (T, D) or None, whose sum is the hidden state."""
Layer = Callable[..., Carry]
"""A layer: `layer(residual, update, remember, again)`, as `run_block` of blocks.py."""
After = Callable[[int, Carry], Carry]
"""What happens between a layer, by its index, and the next one: maps the one's carry to the
other's."""


def summed(carry: Carry) -> Tensor:
    """Return the hidden state (T, D) itself."""
    residual, update = carry
    return residual if update is None else residual + update


def run_layers(
    layers: list[Layer],
    carry: Carry,
    recomputed: int,
    offload: bool = False,
    after: After | None = None,
) -> Carry:
    """Run layers one after the other; in a pass with gradients, recompute the first `recomputed`.

    The last layers are the ones that keep their results, since their gradients come first: where
    the first ones are run again, that memory is free. `after` is not run again.
    """
    for index, layer in enumerate(layers):
        if torch.is_grad_enabled() and index < recomputed:
            # A loaded adapter may have dropout: it is repeated on the device of the arguments.
            place = carry[0].new_empty(0)
            carry = checkpoint(_Again(layer, carry, offload), place, use_reentrant=False)
        else:
            carry = layer(*carry)
        if after is not None:
            carry = after(index, carry)
    return carry


class _Again:
    """A call of a layer that can be repeated: it keeps the sum of the layer's inputs alone."""

    def __init__(self, layer: Layer, carry: Carry, offload: bool):
        self.layer, self.carry, self.offload = layer, carry, offload

    def __call__(self, place: Tensor) -> Carry:
        if self.carry is not None:
            carry, self.carry = self.carry, None
            return self.layer(*carry, remember=self._remember)
        hidden = self.hidden.to(self.device, non_blocking=True)
        return self.layer(hidden.requires_grad_(self.requires_grad), None, again=True)

    def _remember(self, hidden: Tensor) -> None:
        self.device, self.requires_grad = hidden.device, hidden.requires_grad
        self.hidden = hidden.detach()
        if self.offload and hidden.is_cuda:
            host = torch.empty_like(self.hidden, device="cpu", pin_memory=True)
            self.hidden = host.copy_(self.hidden, non_blocking=True)
