"""x"""

import torch

from ..dispatch import use_triton
from .reference import _adamw_chunk
from .rounding import (
    more_bits,
    random_bits,
    random_keys,
    round_stochastically,
)
from .state import BLOCK, Scalars, State

CHUNK = 2**16
"""Elements that the PyTorch path works on at a time, a multiple of BLOCK: its temporaries stay in the cache."""


def adamw_(
    weight: torch.Tensor,
    gradient: torch.Tensor,
    state: State,
    scalars: Scalars,
    keys: tuple[int, int],
    grad_scale: torch.Tensor | None = None,
) -> None:
    """One step in place on a contiguous bf16 or fp32 weight of any shape, and on its state.

    The gradient, bf16 or fp32 and finite, counts `grad_scale` times: a 0-d fp32 tensor on its device, not synchronised.
    Use other `keys` at every step and for every parameter.
    """
    weight, gradient = weight.view(-1), gradient.reshape(-1)
    if use_triton(weight):
        from . import step_triton

        step_triton.adamw_(weight, gradient, state, scalars, keys, grad_scale)
        return
    for first in range(0, len(weight), CHUNK):
        elements, blocks = (
            slice(first, first + CHUNK),
            slice(first // BLOCK, (first + CHUNK) // BLOCK),
        )
        chunk = State(
            state.m[elements],
            state.v[elements],
            state.m_scale[blocks],
            state.v_scale[blocks],
            None if state.remainder is None else state.remainder[elements],
        )
        _adamw_chunk(weight[elements], gradient[elements], chunk, scalars, keys, grad_scale, first)


def add_stochastic_(accumulator: torch.Tensor, gradient: torch.Tensor, seed: int) -> None:
    """accumulator (bf16, contiguous) += gradient (bf16 or fp32, same shape), the fp32 sum rounded stochastically.

    Rounded to nearest, a term below 2⁻⁹ of the sum would be lost; so, the mean is right. Every call needs another seed.
    """
    accumulator, gradient, keys = accumulator.view(-1), gradient.reshape(-1), random_keys(seed)
    if use_triton(accumulator):
        from . import step_triton

        step_triton.add_stochastic_(accumulator, gradient, keys)
        return
    for first in range(0, len(accumulator), CHUNK):
        part = accumulator[first : first + CHUNK]
        total = part.float() + gradient[first : first + CHUNK]
        part.copy_(
            round_stochastically(total, more_bits(random_bits(first, len(part), keys, part.device)))
        )
