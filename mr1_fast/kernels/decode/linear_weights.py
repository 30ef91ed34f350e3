"""What the kernel of linear layers reads of each layer: pointers and lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from ..four_bit.weight import FourBitWeight
from .layer import Layer


class Weights(NamedTuple):
    """What the kernel reads of one layer; None is what no layer of a launch has.

    A layer without what others have gets a pointer of theirs, and a length of 0.
    """

    stored: torch.Tensor
    """(N, D), or (N·D/2,) bytes of two numbers."""
    n: int
    bias: torch.Tensor | None
    biases: int
    """N, or 0 without a bias."""
    a: torch.Tensor | None
    """(rank, D)."""
    b: torch.Tensor | None
    """(N, rank)."""
    rank: int
    scale: float
    code: torch.Tensor | None
    """This and what follows: of weights in 4 bits, as in four_bit/weight.py."""
    absmax: torch.Tensor | None
    absmax_code: torch.Tensor | None
    absmax_scale: torch.Tensor | None
    absmax_offset: torch.Tensor | None


def weights_of(layers: Sequence[Layer]) -> tuple[Weights, ...]:
    """Take layers apart for the kernel."""
    bias = next((layer.bias for layer in layers if layer.bias is not None), None)
    adapter = next((layer.adapter for layer in layers if layer.adapter is not None), None)
    weights = []
    for layer in layers:
        own = layer.adapter or adapter
        four_bit = layer.weight if isinstance(layer.weight, FourBitWeight) else None
        weights.append(
            Weights(
                layer.stored,
                layer.shape[0],
                bias if layer.bias is None else layer.bias,
                0 if layer.bias is None else layer.shape[0],
                own and own.a,
                own and own.b,
                0 if layer.adapter is None else len(own.a),
                float(own.scale) if own else 0.0,
                four_bit and four_bit.code,
                four_bit and four_bit.absmax,
                four_bit and four_bit.absmax_code,
                four_bit and four_bit.absmax_scale,
                four_bit and four_bit.absmax_offset,
            )
        )
    return tuple(weights)


def require_dense(x: torch.Tensor, layers: Sequence[Layer]) -> None:
    """Raise ValueError unless rows of x are dense, and the layers' matrices take them."""
    d = x.shape[1]
    if x.stride(-1) != 1:
        raise ValueError(
            f"x of shape {tuple(x.shape)} has strides {x.stride()}, but its columns must be "
            "adjacent"
        )
    for layer in layers:
        tensors = [layer.stored]
        if layer.adapter is not None:
            tensors += [layer.adapter.a, layer.adapter.b]
        if layer.shape[1] != d or not all(each.is_contiguous() for each in tensors):
            raise ValueError(
                f"a layer of shape {layer.shape} has tensors with strides "
                f"{[each.stride() for each in tensors]}, but they must be dense, for {d} columns"
            )
