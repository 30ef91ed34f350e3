"""Linear layers that take the same input, as one: a query, a key and a value, or a gate and an up.

    y = [x·W₁ᵀ  x·W₂ᵀ …]                          forward, (T, D) → (T, ΣN)
    dx = Σ dyᵢ·Wᵢ,  dW = dyᵀ·x,  dbias = Σ dy      backward

The products are written side by side into one tensor, so that the gradient of all weights is one
product; where the weights are next to one another (joined_weights.py), so are the others. The
biases of several layers are added by the operator that comes next, which reads y anyway; that of a
single layer is added by its product. Layers may have LoRA adapters (adapters.py), to whose products
the large ones are added, and weights in 4 bits (four_bits.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..kernels.decode.layer import Adapter
from .adapters import Adapters, base_and_adapter
from .four_bits import FourBits
from .joined_weights import as_one


class Kept(NamedTuple):
    """What a product keeps for its gradients, beside its input; what is None is computed again."""

    t: Tensor | None = None
    """(T, Σr): the input in the adapters' inner dimensions."""
    weight: Tensor | None = None
    """(ΣN, D): weights that are held in 4 bits."""

    @classmethod
    def among(cls, saved: Sequence[Tensor | None]) -> Iterator[Kept]:
        """Find what several products have kept in a row of saved tensors, which begins with it."""
        size = len(cls._fields)
        for start in range(0, len(saved), size):
            yield cls(*saved[start : start + size])


NOTHING = Kept()
"""What a product keeps that is computed again."""


@dataclass
class Linears:
    """Linear layers on the same input; all of them have a bias, or none has."""

    lengths: tuple[int, ...]
    """Nᵢ, the outputs of each layer."""
    weights: tuple[Tensor, ...]
    """Each (Nᵢ, D); none in 4 bits."""
    bias: Tensor | None
    """(ΣN,)."""
    four_bits: FourBits | None = None
    adapters: Adapters | None = None

    @classmethod
    def of(cls, *modules: nn.Module) -> Linears | None:
        """Take the weights of modules as they are now; None if one of them is not known here."""
        parts = [base_and_adapter(module) for module in modules]
        if None in parts:
            return None
        bases, adapters = zip(*parts, strict=True)

        four_bits = FourBits.of(bases)
        if four_bits is None and any(type(base) is not nn.Linear for base in bases):
            return None
        biases = [base.bias for base in bases]
        if len({bias is None for bias in biases}) > 1:
            return None
        linears = cls(
            lengths=tuple(base.out_features for base in bases),
            weights=() if four_bits else tuple(base.weight for base in bases),
            bias=_side_by_side(biases),
            four_bits=four_bits,
        )
        if linears.bias is not None and linears.bias.dtype != linears.dtype:
            return None
        return linears.with_adapters(adapters)

    def with_adapters(self, adapters: Sequence[Adapter | None]) -> Linears | None:
        """Add an adapter to each layer, or to none; None if some have none, or they differ."""
        if all(adapter is None for adapter in adapters):
            return self
        if any(adapter is None for adapter in adapters):
            return None
        together = Adapters.of(adapters, self.dtype)
        return None if together is None else replace(self, adapters=together)

    @property
    def dtype(self) -> torch.dtype:
        """The dtype of inputs and outputs."""
        return self.four_bits.dtype if self.four_bits else self.weights[0].dtype

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """What `gradients` returns gradients of, in its order; the bias is not among them."""
        return self.weights if self.adapters is None else (*self.weights, *self.adapters.tensors)

    @property
    def bias_to_add(self) -> Tensor | None:
        """The bias that the next operator must add."""
        return self.bias if len(self.lengths) > 1 else None

    def forward(self, x: Tensor) -> Tensor:
        """Compute y (T, ΣN) of x (T, D), with all biases; for use without gradients."""
        y, _ = self.product(x)
        return y if self.bias_to_add is None else y.add_(self.bias_to_add)

    def product(self, x: Tensor, recomputed: bool = False) -> tuple[Tensor, Kept]:
        """Compute y (T, ΣN) of x (T, D), and what the gradients can take from here.

        recomputed: whether the layer runs again for its gradients, which then follow at once. Only
        then are weights of 4 bits kept.
        """
        bias = None if len(self.lengths) > 1 else self.bias
        matrices, t = self._matrices(), None
        if self.adapters is not None:
            y, t = self.adapters.product(x)
            for matrix, part in _with_columns(matrices, y):
                part.addmm_(x, matrix.t())
            if bias is not None:
                y += bias
        elif len(matrices) == 1:
            y = F.linear(x, matrices[0], bias)
        else:
            y = x.new_empty(len(x), sum(self.lengths))
            for matrix, part in _with_columns(matrices, y):
                torch.mm(x, matrix.t(), out=part)
        return y, Kept(t, matrices[0] if self.four_bits and recomputed else None)

    def input_gradient(self, dy: Tensor, kept: Kept) -> tuple[Tensor, Tensor | None]:
        """Compute dx (T, D) of dy (T, ΣN), summed over the layers inside the products.

        The second result is for `gradients`: that of the adapters' inner dimensions.
        """
        parts, dt = _with_columns(self._matrices(kept), dy), None
        if self.adapters is not None:
            dx, dt = self.adapters.input_gradient(dy)
        else:
            matrix, part = next(parts)
            dx = part @ matrix
        for matrix, part in parts:
            dx.addmm_(part, matrix)
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
        if not any(needed):
            return [None] * len(needed)
        if all(needed):
            return (dy.t() @ x).split(self.lengths)
        parts = zip(_with_columns(self.weights, dy), needed, strict=True)
        return [part.t() @ x if wanted else None for (_, part), wanted in parts]

    def _matrices(self, kept: Kept = NOTHING) -> tuple[Tensor, ...]:
        """Return the weights as matrices; as one if they lie behind one another in memory."""
        if self.four_bits is None:
            joined = as_one(self.weights) if len(self.weights) > 1 else None
            return self.weights if joined is None else (joined,)
        return (self.four_bits.dequantise() if kept.weight is None else kept.weight,)


def _with_columns(matrices: Sequence[Tensor], y: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Pair each matrix (N, D) with its columns of (T, ΣN)."""
    return zip(matrices, y.split([len(matrix) for matrix in matrices], dim=1), strict=True)


def _side_by_side(biases: Sequence[Tensor | None]) -> Tensor | None:
    """Join the biases (Nᵢ,) of layers: (ΣN,)."""
    if biases[0] is None or len(biases) == 1:
        return biases[0]
    return torch.cat(biases)
