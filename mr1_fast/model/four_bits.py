"""Weights in 4 bits, as bitsandbytes holds them, in the dtype in which they are multiplied.

bitsandbytes' own layer dequantises its weight at every use: in the forward pass, in recomputation,
and for the gradient of its input. Here the weights of layers on the same input come out below one
another, so that they are one product, and a layer that is run again keeps them until its gradient,
which follows at once: a weight is dequantised once in each pass over a layer.

The allocator hands the same memory to one layer after the other. Between passes there is none, and
in a pass at most one layer's weights, 466 MB for Qwen2-VL-7B and 1.8 GB for the 72B; without
gradients at most those of one product, of which a gate's and an up's are the largest (271 MB).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from ..kernels.four_bit.operations import dequantise
from ..kernels.four_bit.weight import FourBitWeight


@dataclass(frozen=True)
class FourBits:
    """The weights of 4-bit layers on the same input."""

    weights: tuple[FourBitWeight, ...]
    dtype: torch.dtype
    """That of the products."""

    @classmethod
    def of(cls, modules: Sequence[nn.Module]) -> FourBits | None:
        """Take the weights of bitsandbytes' 4-bit layers; None if one of them is another layer."""
        weights = tuple(map(FourBitWeight.of, modules))
        if any(weight is None for weight in weights):
            return None
        dtypes = set(map(product_dtype, modules))
        return cls(weights, dtypes.pop()) if len(dtypes) == 1 else None

    def dequantise(self) -> Tensor:
        """Compute the weights below one another, (ΣN, D)."""
        return dequantise(self.weights, self.dtype)


def product_dtype(module: nn.Module) -> torch.dtype:
    """Return the dtype in which bitsandbytes' 4-bit layer multiplies."""
    return module.compute_dtype or module.weight.quant_state.dtype
