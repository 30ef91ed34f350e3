"""The optimizer's state of one parameter, and the numbers of one step."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch

BLOCK = 256
"""Elements that share the scales of their states."""


class State(NamedTuple):
    """The optimizer's state of one parameter of n elements, flat; all zero at the start."""

    m: torch.Tensor
    """(n,) int8 codes of the mean of gradients."""
    v: torch.Tensor
    """(n,) uint8 codes of the mean of squared gradients."""
    m_scale: torch.Tensor
    """(⌈n/256⌉,) fp32 largest |m| of each block."""
    v_scale: torch.Tensor
    """(⌈n/256⌉,) fp32 largest v of each block."""
    remainder: torch.Tensor | None = None
    """(n,) int16: bits of the fp32 master beyond the bf16 weight's; None: fp32 weights, or stochastic rounding."""

    @classmethod
    def zeros(cls, weight: torch.Tensor, remainder: bool) -> "State":
        """The state before the first step; `remainder` counts for bf16 weights alone."""
        n, blocks = weight.numel(), -(-weight.numel() // BLOCK)
        dtypes = (torch.int8, torch.uint8, torch.float32, torch.float32)
        tensors = [
            torch.zeros(size, dtype=dtype, device=weight.device)
            for size, dtype in zip((n, n, blocks, blocks), dtypes, strict=True)
        ]
        if remainder and weight.dtype == torch.bfloat16:
            tensors.append(torch.zeros(n, dtype=torch.int16, device=weight.device))
        return cls(*tensors)


class Scalars(NamedTuple):
    """What one step multiplies with; rounded to fp32 where it is used."""

    lr: float
    weight_decay: float
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    inverse_correction1: float  # 1/(1 − β₁ᵗ)
    inverse_correction2: float
    eps: float
    limit: float

    @classmethod
    def at(
        cls, step: int, lr: float, betas: Sequence[float], eps: float, weight_decay: float
    ) -> "Scalars":
        """Of step `step`, counted from 1."""
        beta1, beta2 = betas
        corrections = 1 / (1 - beta1**step), 1 / (1 - beta2**step)
        limit = largest_ratio(betas, step)
        values = (lr, weight_decay, beta1, 1 - beta1, beta2, 1 - beta2, *corrections, eps, limit)
        return cls(*map(float, values))  # an int would select another kernel


def largest_ratio(betas: Sequence[float], step: int) -> float:
    """The largest |m̂|/√v̂ that any gradients lead to at step `step`: by Cauchy-Schwarz over the two weighted means.

    1 at the first step; in the limit 1.7 for β = (0.9, 0.98) and 7.3 for (0.9, 0.999).
    """
    beta1, beta2 = betas
    decay = beta1**2 / beta2
    total = step if decay == 1 else (1 - decay**step) / (1 - decay)
    return (1 - beta1) / (1 - beta1**step) * math.sqrt((1 - beta2**step) / (1 - beta2) * total)
