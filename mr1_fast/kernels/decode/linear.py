"""The public linear layers of a decode step: several in one launch.

    linears   x·Wᵀ + b of up to three weights W at once: for queries, keys and values
    swiglu    silu(x·gateᵀ) · (x·upᵀ), without storing either product

A step has few rows, so its time is that of streaming the weights. Bytes: the weights once, where
they are; x once for each tile of weights, from L2. dtype contract: fp16 or bf16, with sums and
gating in fp32, through linear_triton.py; other dtypes, and a CPU, through PyTorch.
"""

import torch
from torch.nn.functional import linear

from ..dispatch import use_triton
from .operations import silu_mul


def linears(
    x: torch.Tensor, weights: tuple[torch.Tensor, ...], biases: tuple[torch.Tensor | None, ...]
) -> tuple[torch.Tensor, ...]:
    """Multiply x (R, D) with each of 1 to 3 weights (N_i, D), and add the biases (N_i,) or None.

    Returns a tuple of (R, N_i); on a GPU, these are columns of one tensor.
    """
    if _fused(x):
        from . import linear_triton

        return linear_triton.linears(x, weights, biases)
    return tuple(linear(x, weight, bias) for weight, bias in zip(weights, biases, strict=True))


def swiglu(x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor) -> torch.Tensor:
    """Compute silu(x·gateᵀ) · (x·upᵀ), (R, F), of x (R, D) and gate, up (F, D)."""
    if _fused(x):
        from . import linear_triton

        return linear_triton.swiglu(x, gate, up)
    return silu_mul(linear(x, gate), linear(x, up))


def _fused(x: torch.Tensor) -> bool:
    """Tell whether linear_triton.py takes these rows."""
    return use_triton(x) and x.dtype in (torch.float16, torch.bfloat16)
