"""Attention of a decode step on a CPU, by csrc/decode_cpu.cpp.

The arguments of a call are packed in one go and passed as bytes, so that it takes only a few µs
besides the attention itself.
"""

import struct

import torch
from torch import Tensor

from ..layers.head_norms import HeadNorms
from ..native import DTYPES, status

MAX_HEAD_SIZE = 256
"""Most channels of a head: DECODE_MAX_D of csrc/decode.h."""
_pack = struct.Struct("@11P9q2d").pack
"""Packs `DecodeArguments` of csrc/decode.h: eleven pointers, nine integers, scale and eps."""


def takes(q: Tensor) -> bool:
    """Tell whether the native kernel handles these queries (R, H, d)."""
    return (
        q.device.type == "cpu"
        and q.dtype in DTYPES
        and q.shape[-1] <= MAX_HEAD_SIZE
        and q.shape[-1] % 2 == 0
        and status()[0] is not None
    )


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cos: Tensor,
    sin: Tensor,
    keys: Tensor,
    values: Tensor,
    spans: Tensor,
    scale: float,
    norms: HeadNorms | None = None,
) -> Tensor:
    """`operations.attend`: (R, H, d).

    Rows that are not dense are copied. Raises ValueError for shapes that do not fit together,
    TypeError for dtypes that differ, spans that are not int32 or pools that are not contiguous.
    """
    rows, heads, d = q.shape
    kv_heads = k.shape[1]
    if not (k.shape == v.shape == (rows, kv_heads, d) and cos.shape == sin.shape == (rows, d)):
        shapes = ", ".join(str(tuple(x.shape)) for x in (q, k, v, cos, sin))
        raise ValueError(f"q, k, v, cos and sin do not fit together: {shapes}")
    if (
        keys.shape != values.shape
        or keys.shape[1:] != (kv_heads, d)
        or heads % kv_heads
        or spans.shape != (rows, 4)
    ):
        shapes = ", ".join(str(tuple(x.shape)) for x in (keys, values, spans))
        raise ValueError(
            f"the pools and spans {shapes} do not fit q {tuple(q.shape)} and k {tuple(k.shape)}"
        )
    dtype = q.dtype
    if not (k.dtype is v.dtype is cos.dtype is sin.dtype is keys.dtype is values.dtype is dtype):
        raise TypeError("q, k, v, cos, sin and the pools are not of one dtype")
    q_norm, k_norm, eps = norms or (None, None, 0.0)
    if norms is not None:
        norms.require_fitting(d)
        if not (q_norm.dtype is k_norm.dtype is dtype):
            raise TypeError(f"a norm's weights are {q_norm.dtype} and {k_norm.dtype}, not {dtype}")
    if spans.dtype is not torch.int32 or not (keys.is_contiguous() and values.is_contiguous()):
        raise TypeError("spans must be int32 and the pools contiguous")

    q, k, v = _dense_rows(q, d), _dense_rows(k, d), _dense_rows(v, d)
    cos, sin, spans = cos.contiguous(), sin.contiguous(), spans.contiguous()
    out = q.new_empty((rows, heads, d))
    status()[0].mr1_decode(
        _pack(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), cos.data_ptr(), sin.data_ptr(),
            _address(q_norm), _address(k_norm),
            keys.data_ptr(), values.data_ptr(), out.data_ptr(), spans.data_ptr(),
            q.stride(0), k.stride(0), v.stride(0), rows, heads, kv_heads, d,
            DTYPES[dtype], torch.get_num_threads(), scale, eps,
        )
    )  # fmt: skip
    return out


def _dense_rows(x: Tensor, d: int) -> Tensor:
    """Return x (R, H, d) if each of its rows is dense, else a copy."""
    _, head_stride, channel_stride = x.stride()
    return x if channel_stride == 1 and head_stride == d else x.contiguous()


def _address(x: Tensor | None) -> int:
    return 0 if x is None else x.data_ptr()
