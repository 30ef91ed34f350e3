"""One step of AdamW on one parameter, and the sum of gradients in bf16."""

import torch

from ..dispatch import use_triton
from . import step_torch
from .rounding import from_element, random_keys
from .state import Scalars, State


def adamw_(
    weight: torch.Tensor,
    gradient: torch.Tensor,
    state: State,
    scalars: Scalars,
    keys: tuple[int, int],
    grad_scale: torch.Tensor | None = None,
) -> None:
    """Make one step in place on a weight of any shape, contiguous and in bf16 or fp32.

    gradient: in the weight's shape, bf16 or fp32, finite.
    state: the weight's `State`, updated in place.
    keys: two 32-bit keys of the random numbers, others at every step and for every parameter.
    grad_scale: what the gradient is multiplied with, a 0-d fp32 tensor on its device, so that
    nothing waits for the GPU (None: 1).
    """
    weight, gradient = weight.view(-1), gradient.reshape(-1)
    if use_triton(weight):
        from . import step_triton

        step_triton.adamw_(weight, gradient, state, scalars, keys, grad_scale)
    else:
        step_torch.adamw_(weight, gradient, state, scalars, keys, grad_scale)


def add_stochastic_(
    accumulator: torch.Tensor, gradient: torch.Tensor, seed: int, first: int = 0
) -> None:
    """Add a gradient in place to a contiguous bf16 accumulator, rounding the sum stochastically.

    Rounding the fp32 sum to nearest would lose every term below 2⁻⁹ of the sum; rounded at random,
    the mean is right. The gradient is bf16 or fp32 and of the accumulator's shape. Every call needs
    another seed, but calls for parts of one tensor, whose element `first` is a part's first one.
    """
    accumulator, gradient = accumulator.view(-1), gradient.reshape(-1)
    keys = from_element(first, random_keys(seed))
    if use_triton(accumulator):
        from . import step_triton

        step_triton.add_stochastic_(accumulator, gradient, keys)
    else:
        step_torch.add_stochastic_(accumulator, gradient, keys)
