"""Dequantisation in PyTorch: its specification, and what runs on a CPU."""

import torch
from torch import Tensor

from .weight import FourBitWeight


def dequantise_ref(weight: FourBitWeight, dtype: torch.dtype) -> Tensor:
    """Compute the weight (N, D) in `dtype`: level times scale in fp32, rounded once."""
    count = weight.shape[0] * weight.shape[1]
    nibbles = torch.stack([weight.packed >> 4, weight.packed & 15], dim=1)
    levels = weight.code[nibbles.flatten()[:count].long()]
    scales = scales_ref(weight).repeat_interleave(weight.block)[:count]
    return (levels * scales).to(dtype).view(weight.shape)


def scales_ref(weight: FourBitWeight) -> Tensor:
    """Compute the scale of each block, (N·D/block,) fp32."""
    if weight.absmax_code is None:
        return weight.absmax
    scales = weight.absmax_code[weight.absmax.long()]
    factors = weight.absmax_scale.repeat_interleave(weight.absmax_block)[: len(scales)]
    return scales * factors + weight.absmax_offset
