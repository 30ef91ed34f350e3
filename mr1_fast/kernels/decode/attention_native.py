"""Decode attention on a CPU by csrc/decode_cpu.cpp: one new token in each row, one layer.

A call takes a few µs besides the attention itself, so its arguments are packed in one go and passed as bytes.
"""

import struct

import torch
from torch import Tensor

from ..native import DTYPES, status

MAX_HEAD_SIZE = 256
_pack = struct.Struct("@9P9qd").pack
"""`DecodeArguments` of csrc/decode.h."""


def takes(q: Tensor) -> bool:
    """Whether the native kernel handles these queries (R, H, d)."""
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
) -> Tensor:
    """Rotate the new tokens' q and k, append k and v to the pools `keys` and `values`, and attend: (R, H, d).

    q (R, H, d), k and v (R, H_kv, d) as projected, each row dense; cos, sin (R, d); the pools (T, H_kv, d). All have
    one dtype. spans (R, 4) int32, in tokens of the pools: start and length of the shared prefix, start and length of
    the row's own tokens. The own length counts the new token, which becomes the last of them. Spans are not checked.
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
    if spans.dtype is not torch.int32 or not (keys.is_contiguous() and values.is_contiguous()):
        raise TypeError("spans must be int32 and the pools contiguous")
    (q, q_stride), (k, k_stride), (v, v_stride) = (
        _dense_rows(q, d),
        _dense_rows(k, d),
        _dense_rows(v, d),
    )
    cos, sin, spans = cos.contiguous(), sin.contiguous(), spans.contiguous()
    out = q.new_empty((rows, heads, d))
    status()[0].mr1_decode(
        _pack(
            q.data_ptr(), k.data_ptr(), v.data_ptr(), cos.data_ptr(), sin.data_ptr(), keys.data_ptr(),
            values.data_ptr(), out.data_ptr(), spans.data_ptr(), q_stride, k_stride, v_stride,
            rows, heads, kv_heads, d, DTYPES[dtype], torch.get_num_threads(), scale,
        )
    )  # fmt: skip
    return out


def _dense_rows(x: Tensor, d: int) -> tuple[Tensor, int]:
    """(R, H, d) with dense rows, and the distance between them in elements."""
    strides = x.stride()
    if strides[2] == 1 and strides[1] == d:
        return x, strides[0]
    x = x.contiguous()
    return x, x.stride(0)
