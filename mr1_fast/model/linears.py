"""Linear layers that take the same input, as one: a query, a key and a value, or a gate and an up.

    y = [x·W₁ᵀ  x·W₂ᵀ …]                          forward, (T, D) → (T, ΣN)
    dx = Σ dyᵢ·Wᵢ,  dW = dyᵀ·x,  dbias = Σ dy      backward

The products are written side by side into one tensor, so that the gradient of all weights is one
product. The biases of several layers are added by the operator that comes next, which reads y
anyway; that of a single layer is added by its product.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn


@dataclass
class Linears:
    """Plain linear layers on the same input; all of them have a bias, or none has."""

    weights: tuple[Tensor, ...]
    """Each (Nᵢ, D)."""
    bias: Tensor | None
    """(ΣN,)."""

    @classmethod
    def of(cls, *modules: nn.Module) -> Linears | None:
        """Take the weights of modules as they are now; None if one is no plain linear layer."""
        if any(type(module) is not nn.Linear for module in modules):
            return None
        biases = [module.bias for module in modules]
        if any(bias is None for bias in biases):
            if any(bias is not None for bias in biases):
                return None
            bias = None
        else:
            bias = biases[0] if len(biases) == 1 else torch.cat(biases)
        return cls(tuple(module.weight for module in modules), bias)

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What `gradients` returns gradients of, in its order; the bias is not among them."""
        return self.weights

    @property
    def bias_to_add(self) -> Tensor | None:
        """The bias that the next operator must add."""
        return self.bias if len(self.weights) > 1 else None

    def product(self, x: Tensor) -> Tensor:
        """Compute y (T, ΣN) of x (T, D)."""
        if len(self.weights) == 1:
            return F.linear(x, self.weights[0], self.bias)
        y = x.new_empty(len(x), sum(map(len, self.weights)))
        for weight, part in zip(self.weights, self._parts(y), strict=True):
            torch.mm(x, weight.t(), out=part)
        return y

    def input_gradient(self, dy: Tensor) -> Tensor:
        """Compute dx (T, D) of dy (T, ΣN), summed over the layers inside the products."""
        first, *others = zip(self.weights, self._parts(dy), strict=True)
        dx = first[1] @ first[0]
        for weight, part in others:
            dx.addmm_(part, weight)
        return dx

    def gradients(self, dy: Tensor, x: Tensor, needed: Sequence[bool]) -> list[Tensor | None]:
        """Compute the gradient of each of `tensors`, where it is needed."""
        if all(needed):
            lengths = [len(weight) for weight in self.weights]
            return list((dy.t() @ x).split(lengths))
        parts = zip(self._parts(dy), needed, strict=True)
        return [part.t() @ x if wanted else None for part, wanted in parts]

    def _parts(self, y: Tensor) -> tuple[Tensor, ...]:
        """Split (T, ΣN) into the columns of each layer."""
        return y.split([len(weight) for weight in self.weights], dim=1)
