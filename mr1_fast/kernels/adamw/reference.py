"""AdamW's equations in PyTorch: the specification of a step, and what the tests compare with."""

import torch

from .rounding import block_scale, decode_v
from .state import Scalars


def adamw_ref(
    weight: torch.Tensor, gradient: torch.Tensor, m: torch.Tensor, v: torch.Tensor, scalars: Scalars
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Compute the new weight, m and v of whole blocks, (blocks, 256) in fp32, before any rounding.

    With exact states, |m̂|/√v̂ cannot exceed a bound that β₁, β₂ and t give (`largest_ratio`). With
    8-bit states it could, where v was rounded down and m up. So the ratio is clamped to the bound,
    and v counts as at least the smallest non-zero code of its block.
    """
    m = m * scalars.beta1 + gradient * scalars.one_minus_beta1
    v = v * scalars.beta2 + gradient * scalars.one_minus_beta2 * gradient

    smallest = decode_v(torch.ones_like(v[:, :1]), block_scale(v))
    denominator = exact_sqrt(torch.maximum(v, smallest) * scalars.inverse_correction2) + scalars.eps
    ratio = m * scalars.inverse_correction1 / denominator
    ratio.clamp_(-scalars.limit, scalars.limit)

    return weight - (weight * scalars.weight_decay + ratio) * scalars.lr, m, v


def exact_sqrt(x: torch.Tensor) -> torch.Tensor:
    """Take the square root of fp32 numbers, correctly rounded, on any device.

    PyTorch's own on a CPU is one bit off in 0.7 % of all cases. In fp64, a root in 1 … 2 is off by
    less than 2⁻⁵², and roots of fp32 numbers are 2⁻⁵⁰ or more away from where rounding changes.
    """
    return x.double().sqrt_().float()


def master_weight(weight: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    """Combine a bf16 weight and its int16 remainder into the fp32 master, shaped as `weight`."""
    high = weight.view(torch.int16).to(torch.int32) << 16
    return (high + remainder.view(weight.shape)).view(torch.float32)
