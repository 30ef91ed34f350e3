"""The RMS norm and the gating on a CPU, by csrc/layers_cpu.cpp.

The norm has the bits of `reference`; the exponential of the gating rounds differently. Arguments of
a call are packed in one go and passed as bytes, so that it takes only a few µs besides its work.
"""

import struct

import torch
from torch import Tensor

from ..native import DTYPES, status
from .strides import adjacent

_pack_norm = struct.Struct("@5P8qd").pack
"""Packs `NormArguments` of csrc/layers.h: five pointers, eight integers, eps."""
_pack_gate = struct.Struct("@3P5q").pack
"""Packs `GateArguments` of csrc/layers.h: three pointers, five integers."""


def takes(x: Tensor, *others: Tensor | None) -> bool:
    """Tell whether the native kernels handle rows x, with others of the same dtype or None."""
    return (
        x.device.type == "cpu"
        and x.dtype in DTYPES
        and all(other is None or other.dtype is x.dtype for other in others)
        and status()[0] is not None
    )


def takes_update(x: Tensor, update: Tensor, weight: Tensor) -> bool:
    """Tell whether `add_norm` handles these tensors: parts of an update are fp32."""
    if update.ndim == 3:
        return takes(x, weight) and update.dtype is torch.float32 and len(update) > 0
    return takes(x, update, weight)


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`operations.norm` without a bias: (T, D). Raises ValueError for shapes that do not fit."""
    return _norm(x, None, weight, eps)[1]


def add_norm(x: Tensor, update: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`operations.add_norm` without a bias: (T, D) twice. Raises ValueError as `norm` does."""
    return _norm(x, update, weight, eps)


def _norm(
    x: Tensor, update: Tensor | None, weight: Tensor, eps: float
) -> tuple[Tensor | None, Tensor]:
    rows, d = shape = x.shape
    if weight.shape != (d,) or (update is not None and update.shape[-2:] != shape):
        shapes = ", ".join(str(tuple(t.shape)) for t in (x, update, weight) if t is not None)
        raise ValueError(f"rows, update and weight do not fit together: {shapes}")
    x, weight, out = adjacent(x), adjacent(weight), x.new_empty(shape)
    residual, of_update = None, (0, 0, 0, 0)  # address, strides of rows and of parts, parts
    if update is not None:
        update, residual = adjacent(update), x.new_empty(shape)
        parts = (update.stride(0), len(update)) if update.ndim == 3 else (0, 0)
        of_update = update.data_ptr(), update.stride(-2), *parts
    address, *strides_and_parts = of_update
    status()[0].mr1_norm(
        _pack_norm(
            x.data_ptr(), address, weight.data_ptr(),
            0 if residual is None else residual.data_ptr(), out.data_ptr(),
            x.stride(0), *strides_and_parts, rows, d,
            DTYPES[x.dtype], torch.get_num_threads(), eps,
        )
    )  # fmt: skip
    return residual, out


def silu_mul(gate_up: Tensor, bias: Tensor | None) -> Tensor:
    """`operations.silu_mul`: (T, F). Raises ValueError where the bias does not fit."""
    rows, columns = gate_up.shape
    if columns % 2 or (bias is not None and bias.shape != (columns,)):
        shapes = tuple(gate_up.shape), None if bias is None else tuple(bias.shape)
        raise ValueError("gate_up {} and bias {} do not fit together".format(*shapes))
    gate_up = adjacent(gate_up)
    bias = None if bias is None else adjacent(bias)
    out = gate_up.new_empty((rows, columns // 2))
    status()[0].mr1_silu_mul(
        _pack_gate(
            gate_up.data_ptr(), 0 if bias is None else bias.data_ptr(), out.data_ptr(),
            gate_up.stride(0), rows, columns // 2, DTYPES[gate_up.dtype], torch.get_num_threads(),
        )
    )  # fmt: skip
    return out
