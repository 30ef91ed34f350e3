"""What the kernel of linear layers reads of each layer: pointers and lengths."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from .layer import Adapter, Layer


class Weights(NamedTuple):
    """What the kernel reads of one layer.

    A layer without what others have gets a pointer of theirs, and a length of 0. What no layer of a
    launch has is a pointer to anything: functions of Triton 3.6 cannot return None.
    """

    stored: torch.Tensor
    """(N, D), or (N·D/2,) bytes of two numbers."""
    n: int
    bias: torch.Tensor
    biases: int
    """N, or 0 without a bias."""
    a: torch.Tensor
    """(rank, D)."""
    b: torch.Tensor
    """(N, rank)."""
    rank: int
    scale: float
    code: torch.Tensor
    """This and what follows: of weights in 4 bits, as in four_bit/weight.py."""
    absmax: torch.Tensor
    absmax_code: torch.Tensor
    absmax_scale: torch.Tensor
    absmax_offset: torch.Tensor


def weights_of(layers: Sequence[Layer]) -> tuple[Weights, ...]:
    """Take layers apart for the kernel."""
    bias = next((layer.bias for layer in layers if layer.bias is not None), None)
    adapter = next((layer.adapter for layer in layers if layer.adapter is not None), None)
    return tuple(_weights_of(layer, bias, adapter) for layer in layers)


def _weights_of(layer: Layer, bias: torch.Tensor | None, adapter: Adapter | None) -> Weights:
    """Take a layer apart; bias and adapter are another's, for a layer without one."""
    n, own = layer.shape[0], layer.adapter or adapter
    names = "code", "absmax", "absmax_code", "absmax_scale", "absmax_offset"
    pointers = [
        bias if layer.bias is None else layer.bias,
        own.a if own else None,
        own.b if own else None,
        *(getattr(layer.weight, name, None) for name in names),
    ]
    bias, a, b, *quantised = (layer.stored if each is None else each for each in pointers)
    biases = 0 if layer.bias is None else n
    rank = 0 if layer.adapter is None else len(a)
    scale = float(own.scale) if own else 0.0
    return Weights(layer.stored, n, bias, biases, a, b, rank, scale, *quantised)


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
