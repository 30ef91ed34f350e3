"""The public linear layers of a decode step: several in one launch.

    linears       x·Wᵀ + bias of up to three layers at once: queries, keys and values
    swiglu        silu(x·gateᵀ) · (x·upᵀ), without storing either product
    linear_parts  x·Wᵀ in parts over D, which the next norm adds up: o_proj, down_proj

Each with the layers' LoRA adapters, and weights in 16 or 4 bits (layer.py). A step has few rows, so
its time is that of streaming the weights. Bytes: the weights once, where they are and as they are
stored; x and the adapters once for each tile of weights, from L2. dtype contract: fp16 or bf16,
with sums and gating in fp32, through linear_triton.py; other dtypes, and a CPU, through PyTorch.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from ..dispatch import use_triton
from ..four_bit.weight import FourBitWeight
from ..layers.operations import silu_mul
from .layer import Layer
from .reference import linear_ref

LARGEST_RANK = 128
"""Rank of an adapter up to which its A is multiplied in the same loop as the weight."""
FOUR_BIT_BLOCK = 64
"""Numbers that have one scale, in a weight in 4 bits that the kernel takes."""


def takes(layers: Sequence[Layer], like: Tensor) -> bool:
    """Tell whether one kernel computes these layers, for rows x of the dtype and device of `like`.

    If not, PyTorch does, and other ways may be faster.
    """
    adapters = [layer.adapter for layer in layers if layer.adapter is not None]
    return (
        use_triton(like)
        and like.dtype in (torch.float16, torch.bfloat16)
        and len({_storage(layer) for layer in layers}) <= 1
        and all(layer.in_four_bits or layer.stored.dtype == like.dtype for layer in layers)
        and all(_has_whole_blocks(layer) for layer in layers)
        and len({(adapter.a.dtype, adapter.b.dtype) for adapter in adapters}) <= 1
        and all(len(adapter.a) <= LARGEST_RANK for adapter in adapters)
    )


def linears(x: Tensor, layers: Sequence[Layer]) -> tuple[Tensor, ...]:
    """Apply each of 1 to 3 layers to x (R, D).

    Returns a tuple of (R, N_i); on a GPU, these are columns of one tensor.
    """
    if takes(layers, x):
        from . import linear_triton

        return linear_triton.linears(x, layers)
    return tuple(linear_ref(x, layer) for layer in layers)


def swiglu(x: Tensor, gate: Layer, up: Layer) -> Tensor:
    """Compute silu(gate(x)) · up(x), (R, F), of x (R, D)."""
    if takes((gate, up), x):
        from . import linear_triton

        return linear_triton.swiglu(x, gate, up)
    return silu_mul(torch.cat([linear_ref(x, gate), linear_ref(x, up)], dim=1), None)


def linear_parts(x: Tensor, layer: Layer) -> Tensor:
    """Apply a layer to x (R, D) in S parts over D, whose sum is the result: (S, R, N) fp32.

    Where one part is enough, it is (R, N) in the dtype of x. `operations.add_rms_norm` takes both.
    """
    if takes((layer,), x):
        from . import linear_triton

        return linear_triton.linear_parts(x, layer)
    return linear_ref(x, layer)


def splits(layer: Layer, like: Tensor) -> bool:
    """Tell whether `linear_parts` takes our kernel for a layer that `takes` accepts.

    For a plain layer it is PyTorch's product, until a sweep has found the kernel to be faster.
    """
    from . import linear_tiles

    x = like.new_empty(1, layer.shape[1])
    return linear_tiles.choose_tile("parts", x, (layer,)) != linear_tiles.BY_PYTORCH


def _storage(layer: Layer) -> tuple:
    """Describe how a weight is stored: one launch takes layers that are stored alike."""
    weight = layer.weight
    if isinstance(weight, FourBitWeight):
        return weight.absmax.dtype, weight.absmax_block
    return (weight.dtype,)


def _has_whole_blocks(layer: Layer) -> bool:
    """Tell whether rows of a weight in 4 bits consist of blocks of 64; True for other weights."""
    weight = layer.weight
    if isinstance(weight, FourBitWeight):
        return weight.block == FOUR_BIT_BLOCK and weight.shape[1] % FOUR_BIT_BLOCK == 0
    return True
