"""The public operation on weights in 4 bits: which back end takes a call, by device and layout."""

from collections.abc import Sequence
from importlib.util import find_spec

import torch
from torch import Tensor

from ..dispatch import use_triton
from .reference import dequantise_ref, scales_ref
from .weight import FourBitWeight


def dequantise(weights: Sequence[FourBitWeight], dtype: torch.dtype) -> Tensor:
    """Compute the weights (Nᵢ, D) in `dtype`, one below the other: (ΣN, D).

    On a GPU this is one launch, and nothing else is allocated. Elsewhere bitsandbytes' operator
    computes the same numbers, in a tenth of the reference's time.
    """
    lengths, packed = [weight.shape[0] for weight in weights], weights[0].packed
    out = torch.empty(sum(lengths), weights[0].shape[1], dtype=dtype, device=packed.device)
    if out.is_meta:
        return out
    if use_triton(out) and _one_launch_takes(weights):
        from . import dequantise_triton

        dequantise_triton.dequantise(weights, out)
        return out
    for weight, part in zip(weights, out.split(lengths), strict=True):
        compute = _by_bitsandbytes if _bitsandbytes_takes(weight) else dequantise_ref
        part.copy_(compute(weight, dtype))
    return out


def _one_launch_takes(weights: Sequence[FourBitWeight]) -> bool:
    """Tell whether all blocks are whole and of the same kind."""
    kinds = {(weight.block, weight.absmax_block) for weight in weights}
    return len(kinds) == 1 and all(
        weight.absmax.numel() * weight.block == 2 * weight.packed.numel() for weight in weights
    )


def _bitsandbytes_takes(weight: FourBitWeight) -> bool:
    """Tell whether bitsandbytes is there, and right: on a CPU, it lets a block end with its row."""
    whole = weight.shape[1] % weight.block == 0
    return find_spec("bitsandbytes") is not None and (whole or not weight.packed.is_cpu)


def _by_bitsandbytes(weight: FourBitWeight, dtype: torch.dtype) -> Tensor:
    """`dequantise_ref` by bitsandbytes, which knows two codes: fp4's second level is positive."""
    import bitsandbytes  # noqa: F401  # registers its operators

    kind = "fp4" if weight.code[1] > 0 else "nf4"
    return torch.ops.bitsandbytes.dequantize_4bit(
        weight.packed.view(-1, 1), scales_ref(weight), weight.block, kind, weight.shape, dtype
    )
