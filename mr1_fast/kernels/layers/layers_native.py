"""The RMS norm and the gating on a CPU, by csrc/layers_cpu.cpp.

On x86, the norm has the bits of `reference`; the exponential of the gating rounds differently.
Arguments of a call are packed in one go and passed as bytes, so that it takes only a few µs besides
its work.
"""

import struct

import torch
from torch import Tensor

from ..native import DTYPES, status
from .strides import adjacent

_pack_norm = struct.Struct("@5P6qd").pack
"""Packs `NormArguments` of csrc/layers.h: five pointers, six integers, eps."""
_pack_gate = struct.Struct("@3P5q").pack
"""Packs `GateArguments` of csrc/layers.h: three pointers, five integers."""


def takes(x: Tensor, other: Tensor | None) -> bool:
    """Tell whether the native kernels handle rows x, with a weight or bias of the same dtype."""
    return (
        x.device.type == "cpu"
        and x.dtype in DTYPES
        and (other is None or other.dtype is x.dtype)
        and status()[0] is not None
    )


def norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """`operations.norm` without a bias: (T, D). Raises ValueError for shapes that do not fit."""
    rows, d = x.shape
    x, out = adjacent(x), x.new_empty((rows, d))
    _call(x, 0, 0, weight, 0, out, eps)
    return out


def add_norm(x: Tensor, update: Tensor, weight: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """`operations.add_norm` without a bias: (T, D) twice. Raises ValueError as `norm` does."""
    rows, d = shape = x.shape
    if update.shape != shape:
        raise ValueError(f"update {tuple(update.shape)} does not fit rows {tuple(shape)}")
    x, update = adjacent(x), adjacent(update)
    residual, out = x.new_empty((rows, d)), x.new_empty((rows, d))
    _call(x, update.data_ptr(), update.stride(0), weight, residual.data_ptr(), out, eps)
    return residual, out


def _call(
    x: Tensor,
    update: int,
    update_stride: int,
    weight: Tensor,
    residual: int,
    out: Tensor,
    eps: float,
) -> None:
    """Call the kernel; `update` and `residual` are addresses, 0 where there is none."""
    rows, d = out.shape
    if weight.shape != (d,):
        raise ValueError(f"weight {tuple(weight.shape)} does not fit rows {(rows, d)}")
    weight = adjacent(weight)  # which must live during the call
    status()[0].mr1_norm(
        _pack_norm(
            x.data_ptr(), update, weight.data_ptr(), residual, out.data_ptr(),
            x.stride(0), update_stride, rows, d,
            DTYPES[x.dtype], torch.get_num_threads(), eps,
        )
    )  # fmt: skip


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
