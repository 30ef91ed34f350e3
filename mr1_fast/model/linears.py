"""Linear layers that take the same input, as one: a query, a key and a value, or a gate and an up.

    y = [x·W₁ᵀ  x·W₂ᵀ …]                          forward, (T, D) → (T, ΣN)
    dx = Σ dyᵢ·Wᵢ,  dW = dyᵀ·x,  dbias = Σ dy      backward

The products are written side by side into one tensor, so that the gradient of all weights is one
product. The biases of several layers are added by the operator that comes next, which reads y
anyway; that of a single layer is added by its product. Layers may have LoRA adapters (adapters.py),
whose products are those that the large ones are added to.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapters import Adapters, base_and_adapter


class Kept(NamedTuple):
    """What a product keeps for its gradients, beside its input."""

    t: Tensor | None = None
    """(T, Σr): the input in the adapters' inner dimensions; without it, it is computed again."""

    @classmethod
    def among(cls, saved: Sequence[Tensor | None]) -> Iterator[Kept]:
        """Find what several products have kept in a row of saved tensors, which begins with it."""
        size = len(cls._fields)
        for start in range(0, len(saved), size):
            yield cls(*saved[start : start + size])


@dataclass
class Linears:
    """Linear layers on the same input; all of them have a bias, or none has."""

    weights: tuple[Tensor, ...]
    """Each (Nᵢ, D)."""
    bias: Tensor | None
    """(ΣN,)."""
    adapters: Adapters | None = None

    @classmethod
    def of(cls, *modules: nn.Module) -> Linears | None:
        """Take the weights of modules as they are now; None if one of them is not known here."""
        parts = [base_and_adapter(module) for module in modules]
        if None in parts:
            return None
        bases, adapters = zip(*parts, strict=True)
        if any(type(base) is not nn.Linear for base in bases):
            return None
        biases = [base.bias for base in bases]
        if len({bias is None for bias in biases}) > 1:
            return None
        if len({adapter is None for adapter in adapters}) > 1:
            return None

        linears = cls(tuple(base.weight for base in bases), _side_by_side(biases))
        if adapters[0] is not None:
            linears.adapters = Adapters.of(adapters, bases[0].weight.dtype)
            if linears.adapters is None:
                return None
        return linears

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What `gradients` returns gradients of, in its order; the bias is not among them."""
        return self.weights if self.adapters is None else (*self.weights, *self.adapters.tensors)

    @property
    def bias_to_add(self) -> Tensor | None:
        """The bias that the next operator must add."""
        return self.bias if len(self.weights) > 1 else None

    def product(self, x: Tensor) -> tuple[Tensor, Kept]:
        """Compute y (T, ΣN) of x (T, D), and what the gradients can take from here."""
        bias = None if len(self.weights) > 1 else self.bias
        if self.adapters is not None:
            y, t = self.adapters.product(x)
            for weight, part in self._with_columns(y):
                part.addmm_(x, weight.t())
            return y if bias is None else y.add_(bias), Kept(t)

        if len(self.weights) == 1:
            return F.linear(x, self.weights[0], bias), Kept()
        y = x.new_empty(len(x), sum(map(len, self.weights)))
        for weight, part in self._with_columns(y):
            torch.mm(x, weight.t(), out=part)
        return y, Kept()

    def input_gradient(self, dy: Tensor) -> tuple[Tensor, Tensor | None]:
        """Compute dx (T, D) of dy (T, ΣN), summed over the layers inside the products.

        The second result is for `gradients`: that of the adapters' inner dimensions.
        """
        parts, dt = self._with_columns(dy), None
        if self.adapters is not None:
            dx, dt = self.adapters.input_gradient(dy)
        else:
            weight, part = next(parts)
            dx = part @ weight
        for weight, part in parts:
            dx.addmm_(part, weight)
        return dx, dt

    def gradients(
        self,
        dy: Tensor,
        x: Tensor,
        needed: Sequence[bool],
        kept: Kept,
        dt: Tensor | None,
    ) -> list[Tensor | None]:
        """Compute the gradient of each of `tensors`, where it is needed.

        kept, dt: what `product` and `input_gradient` returned for it.
        """
        count = len(self.weights)
        found = self._weight_gradients(dy, x, needed[:count])
        if self.adapters is not None and any(needed[count:]):
            t = self.adapters.inner(x) if kept.t is None else kept.t
            dt = self.adapters.inner_gradient(dy) if dt is None else dt
            return [*found, *self.adapters.gradients(dy, x, needed[count:], t, dt)]
        return [*found, *[None] * (len(needed) - count)]

    def _weight_gradients(
        self, dy: Tensor, x: Tensor, needed: Sequence[bool]
    ) -> Sequence[Tensor | None]:
        if all(needed):
            return (dy.t() @ x).split([len(weight) for weight in self.weights])
        parts = zip(self._with_columns(dy), needed, strict=True)
        return [part.t() @ x if wanted else None for (_, part), wanted in parts]

    def _with_columns(self, y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Pair each weight with its columns of (T, ΣN)."""
        parts = y.split([len(weight) for weight in self.weights], dim=1)
        return zip(self.weights, parts, strict=True)


def _side_by_side(biases: Sequence[Tensor | None]) -> Tensor | None:
    """Join the biases (Nᵢ,) of layers: (ΣN,)."""
    if biases[0] is None or len(biases) == 1:
        return biases[0]
    return torch.cat(biases)
