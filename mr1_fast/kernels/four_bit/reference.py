"""Dequantisation in PyTorch: its specification, and what runs on a CPU."""

import torch
from torch import Tensor

from .weight import FourBitWeight


def dequantise_ref(weight: FourBitWeight, dtype: torch.dtype) -> Tensor:
    """Compute the weight (N, D) in `dtype`: level times scale in fp32, rounded once."""
    nibbles = torch.stack([weight.packed >> 4, weight.packed & 15], dim=1)
    levels = weight.code[nibbles.flatten().long()].view(-1, weight.block)
    return (levels * scales_ref(weight)[:, None]).to(dtype).view(weight.shape)


def scales_ref(weight: FourBitWeight) -> Tensor:
    """Compute the scale of each block, (N·D/block,) fp32."""
    if weight.absmax_code is None:
        return weight.absmax
    scales = weight.absmax_code[weight.absmax.long()]
    factors = weight.absmax_scale.repeat_interleave(weight.absmax_block)[: len(scales)]
    return scales * factors + weight.absmax_offset
