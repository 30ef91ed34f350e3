"""A linear layer as the decode kernels read it: its tensors stay where they are."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor

from ..four_bit.weight import FourBitWeight


@dataclass(frozen=True)
class Adapter:
    """The LoRA adapter of one linear layer, which adds scale · x·Aᵀ·Bᵀ to its result."""

    a: Tensor
    """(r, D)."""
    b: Tensor
    """(N, r)."""
    scale: float


@dataclass(frozen=True)
class Layer:
    """A linear layer: x·Wᵀ + bias + scale · x·Aᵀ·Bᵀ.

    W is dense, (N, D), or in 4 bits. Adapters may be in another dtype than x, mostly fp32: they are
    rounded to the dtype of x where they are multiplied, as in training.
    """

    weight: Tensor | FourBitWeight
    bias: Tensor | None = None
    """(N,)."""
    adapter: Adapter | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(N, D)."""
        return tuple(self.weight.shape)

    @property
    def in_four_bits(self) -> bool:
        """Tell whether the weight is in 4 bits."""
        return isinstance(self.weight, FourBitWeight)

    @property
    def stored(self) -> Tensor:
        """The tensor that holds the weight, packed if it is in 4 bits."""
        return self.weight.packed if isinstance(self.weight, FourBitWeight) else self.weight
