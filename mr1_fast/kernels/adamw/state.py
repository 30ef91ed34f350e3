"""The optimizer's states of one parameter, and the numbers that one step multiplies with.

States are block-wise as in arXiv 2110.02861, with a power instead of a codebook: 256 elements share
an fp32 scale, their largest magnitude, and each has a code of 8 bits:

    m = scale·sign(c)·(c/127)⁴,  c in −127…127
    v = scale·(c/255)⁸,          c in 0…255

So √v follows a fourth power, too. Lower powers ended 2 to 10 times further from fp32 where the
gradients of a block differ in size.

A step computes with m and v in fp32; they are rounded afterwards, up or down at random so that the
mean is right; rounding.py defines the codes to the bit, for every device. Rounded to nearest, a v
whose gradients have become small would never fall: β₂ = 0.98 changes it by 2 % a step, and codes
are 3 % apart.

A bf16 weight w keeps the bits that complete it to its fp32 master as an int16 remainder:

    w = (bits + 0x8000) >> 16,  remainder = bits − (w << 16),  bits: the master's, as int32

Without a remainder the new weight is rounded stochastically. bf16 rounded to nearest would lose
nearly all updates at η = 1e-6, because a weight's neighbours are 2⁻⁸ of its value away. An fp32
weight is its own master.
"""

import math
from collections.abc import Sequence
from functools import partial
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
    """(n,) int16 bits of the fp32 master beyond the bf16 weight's.

    None for fp32 weights, and where bf16 weights are rounded stochastically.
    """

    @classmethod
    def zeros(cls, weight: torch.Tensor, remainder: bool) -> "State":
        """Allocate the state before the first step; only bf16 weights can have a remainder."""
        n, blocks = weight.numel(), -(-weight.numel() // BLOCK)
        zeros = partial(torch.zeros, device=weight.device)
        has_remainder = remainder and weight.dtype == torch.bfloat16
        return cls(
            m=zeros(n, dtype=torch.int8),
            v=zeros(n, dtype=torch.uint8),
            m_scale=zeros(blocks, dtype=torch.float32),
            v_scale=zeros(blocks, dtype=torch.float32),
            remainder=zeros(n, dtype=torch.int16) if has_remainder else None,
        )

    def chunk(self, first: int, size: int) -> "State":
        """View the state of elements `first` … `first` + `size` − 1, both multiples of BLOCK."""
        elements = slice(first, first + size)
        blocks = slice(first // BLOCK, (first + size) // BLOCK)
        return State(
            m=self.m[elements],
            v=self.v[elements],
            m_scale=self.m_scale[blocks],
            v_scale=self.v_scale[blocks],
            remainder=None if self.remainder is None else self.remainder[elements],
        )


class Scalars(NamedTuple):
    """The numbers that one step multiplies with; the kernels round them to fp32."""

    lr: float
    weight_decay: float
    beta1: float
    one_minus_beta1: float
    beta2: float
    one_minus_beta2: float
    inverse_correction1: float
    """1/(1 − β₁ᵗ), which makes m̂ of m."""
    inverse_correction2: float
    """1/(1 − β₂ᵗ), which makes v̂ of v."""
    eps: float
    limit: float
    """Bound of |m̂|/√v̂, by `largest_ratio`."""

    @classmethod
    def at(
        cls, step: int, lr: float, betas: Sequence[float], eps: float, weight_decay: float
    ) -> "Scalars":
        """Compute the numbers of step `step`, counted from 1."""
        beta1, beta2 = betas
        # Floats without exception: Triton would compile another kernel for an int.
        return cls(
            lr=float(lr),
            weight_decay=float(weight_decay),
            beta1=float(beta1),
            one_minus_beta1=float(1 - beta1),
            beta2=float(beta2),
            one_minus_beta2=float(1 - beta2),
            inverse_correction1=float(1 / (1 - beta1**step)),
            inverse_correction2=float(1 / (1 - beta2**step)),
            eps=float(eps),
            limit=float(largest_ratio(betas, step)),
        )


def largest_ratio(betas: Sequence[float], step: int) -> float:
    """Bound |m̂|/√v̂ at step `step` for any gradients, by Cauchy-Schwarz over the two weighted means.

    The bound is 1 at the first step; in the limit it is 1.7 for β = (0.9, 0.98) and 7.3 for
    (0.9, 0.999).
    """
    beta1, beta2 = betas
    decay = beta1**2 / beta2
    total = step if decay == 1 else (1 - decay**step) / (1 - decay)
    return (1 - beta1) / (1 - beta1**step) * math.sqrt((1 - beta2**step) / (1 - beta2) * total)
