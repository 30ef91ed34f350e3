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


@dataclass(frozen=True)
class FourBits:
    """The weights of 4-bit layers on the same input."""

    weights: tuple[Tensor, ...]
    """Each holds packed numbers, and has a `quant_state` of bitsandbytes."""
    dtype: torch.dtype
    """That of the products."""

    @classmethod
    def of(cls, modules: Sequence[nn.Module]) -> FourBits | None:
        """Take the weights of bitsandbytes' 4-bit layers; None if one of them is another layer."""
        if not all(map(_is_four_bit, modules)):
            return None
        dtypes = {module.compute_dtype or module.weight.quant_state.dtype for module in modules}
        weights = tuple(module.weight for module in modules)
        return cls(weights, dtypes.pop()) if len(dtypes) == 1 else None

    def dequantise(self) -> Tensor:
        """Compute the weights below one another, (ΣN, D)."""
        lengths = [weight.quant_state.shape[0] for weight in self.weights]
        width = self.weights[0].quant_state.shape[1]
        device = self.weights[0].device
        result = torch.empty(sum(lengths), width, dtype=self.dtype, device=device)
        for weight, part in zip(self.weights, result.split(lengths), strict=True):
            dequantise_weight(weight, out=part)
        return result


def _is_four_bit(module: nn.Module) -> bool:
    """Tell whether a module computes as bitsandbytes' Linear4bit does on a GPU."""
    state = getattr(getattr(module, "weight", None), "quant_state", None)
    if state is None or not hasattr(module, "compute_dtype"):
        return False
    if getattr(state, "packing_format_for_cpu", False):
        return False  # for a product on CPUs with AVX-512, in another order
    return tuple(state.shape) == (module.out_features, module.in_features)


def dequantise_weight(weight: Tensor, out: Tensor) -> None:
    """Dequantise a packed weight into `out` (N, D), in its dtype."""
    state = weight.quant_state
    if weight.is_meta:
        # A plan needs no bitsandbytes, which makes the scales of all blocks on the way.
        out.new_empty(-(-out.numel() // state.blocksize), dtype=torch.float32)
        return
    from bitsandbytes.functional import dequantize_4bit

    packed = weight.data.view(-1, 1)
    if weight.is_cuda and state.dtype == out.dtype:
        dequantize_4bit(packed, state, out=out)
    else:
        out.copy_(dequantize_4bit(packed, state))
