"""The rotary embedding in Triton, forward and backward, on all heads of a token at once.

A program holds some heads, each as its two halves, which are each other's partners: every channel
is read once and written once. A head's angles, and the bias, are read again by each program that
needs them, from the L1 cache. Heads of any even width work: their halves are padded to a power of
two, and what is beyond them is neither read nor written.
"""

import torch
import triton
import triton.language as tl

from ..launch import MOST_PROGRAMS, launch

HALF_CHANNELS = 1024
"""Channels of one half that a program holds, over its heads: a token of Qwen2-VL 2B."""
WARPS = 2
"""Warps of a program: a thread has 16 channels of each half, and 8 on AMD."""

# --- device functions ---------------------------------------------------------------------------


@triton.jit
def _positions(rows, HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr):
    """Return a program's tokens and heads (ROWS, 1), its channels of the first half (1, HALF).

    And which of them exist (ROWS, HALF).
    """
    row = (tl.program_id(0) * ROWS + tl.arange(0, ROWS))[:, None]
    channel = tl.arange(0, HALF)[None, :]
    inside = (row < rows) & (channel < D // 2)
    return (row // HEADS).to(tl.int64), row % HEADS, channel, inside


@triton.jit
def _load_angles(ANGLES, at, mask, D: tl.constexpr):
    """Load cosines or sines of both halves."""
    first = tl.load(ANGLES + at, mask=mask, other=0.0).to(tl.float32)
    return first, tl.load(ANGLES + at + D // 2, mask=mask, other=0.0).to(tl.float32)


@triton.jit
def _rotate(x1, x2, c1, c2, s1, s2, dtype: tl.constexpr):
    """Compute x·cos + (−x2, x1)·sin of both halves; x, products and sums are rounded to dtype."""
    x1 = x1.to(dtype).to(tl.float32)
    x2 = x2.to(dtype).to(tl.float32)
    y1 = (x1 * c1).to(dtype).to(tl.float32) - (x2 * s1).to(dtype).to(tl.float32)
    y2 = (x2 * c2).to(dtype).to(tl.float32) + (x1 * s2).to(dtype).to(tl.float32)
    return y1.to(dtype), y2.to(dtype)


# --- kernels ------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["rows"])
def _rotary_kernel(
    QKV, qkv_stride, BIAS, COS, cos_stride, SIN, sin_stride, Q, K, V, rows,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr,
    HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Add the bias and rotate ROWS heads, counted over all `rows` heads of all tokens."""
    token, head, channel, inside = _positions(rows, HEADS + 2 * KV_HEADS, D, HALF, ROWS)
    dtype = QKV.dtype.element_ty
    x = QKV + token * qkv_stride + head * D + channel
    x1 = tl.load(x, mask=inside, other=0.0)
    x2 = tl.load(x + D // 2, mask=inside, other=0.0)
    if BIAS is not None:
        bias = BIAS + head * D + channel
        b1 = tl.load(bias, mask=inside, other=0.0).to(tl.float32)
        b2 = tl.load(bias + D // 2, mask=inside, other=0.0).to(tl.float32)
        x1 = (x1.to(tl.float32) + b1).to(dtype)
        x2 = (x2.to(tl.float32) + b2).to(dtype)
    turned = head < HEADS + KV_HEADS
    c1, c2 = _load_angles(COS, token * cos_stride + channel, inside & turned, D)
    s1, s2 = _load_angles(SIN, token * sin_stride + channel, inside & turned, D)
    y1, y2 = _rotate(x1, x2, c1, c2, s1, s2, COS.dtype.element_ty)
    y1 = tl.where(turned, y1.to(dtype), x1)
    y2 = tl.where(turned, y2.to(dtype), x2)
    is_q = inside & (head < HEADS)
    q = Q + (token * HEADS + head) * D + channel
    tl.store(q, y1, mask=is_q)
    tl.store(q + D // 2, y2, mask=is_q)
    is_k = inside & (head >= HEADS) & turned
    at = (token * KV_HEADS + head - HEADS) * D + channel
    tl.store(K + at, y1, mask=is_k)
    tl.store(K + at + D // 2, y2, mask=is_k)
    is_v = inside & (head >= HEADS + KV_HEADS)
    at -= KV_HEADS * D
    tl.store(V + at, y1, mask=is_v)
    tl.store(V + at + D // 2, y2, mask=is_v)


@triton.jit(do_not_specialize=["rows"])
def _rotary_backward_kernel(
    DQ, q_token, q_head, DK, k_token, k_head, DV, v_token, v_head,
    COS, cos_stride, SIN, sin_stride, DQKV, rows,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr,
    HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Rotate the gradients of ROWS heads back, counted over all `rows` heads of all tokens."""
    token, head, channel, inside = _positions(rows, HEADS + 2 * KV_HEADS, D, HALF, ROWS)
    dtype = DQ.dtype.element_ty
    turned = head < HEADS + KV_HEADS
    is_q = inside & (head < HEADS)
    is_k = inside & (head >= HEADS) & turned
    is_v = inside & (head >= HEADS + KV_HEADS)
    q = DQ + token * q_token + head.to(tl.int64) * q_head + channel
    k = DK + token * k_token + (head - HEADS).to(tl.int64) * k_head + channel
    value = head - HEADS - KV_HEADS
    v = DV + token * v_token + value.to(tl.int64) * v_head + channel
    # All loads are on their way before one of them is waited for
    q1 = tl.load(q, mask=is_q, other=0.0)
    k1 = tl.load(k, mask=is_k, other=0.0)
    v1 = tl.load(v, mask=is_v, other=0.0)
    q2 = tl.load(q + D // 2, mask=is_q, other=0.0)
    k2 = tl.load(k + D // 2, mask=is_k, other=0.0)
    v2 = tl.load(v + D // 2, mask=is_v, other=0.0)
    c1, c2 = _load_angles(COS, token * cos_stride + channel, inside & turned, D)
    s1, s2 = _load_angles(SIN, token * sin_stride + channel, inside & turned, D)
    y1 = tl.where(is_q, q1, k1)
    y2 = tl.where(is_q, q2, k2)
    # The transposed rotation: each sine moves to the channel that it multiplied
    x1, x2 = _rotate(y1, y2, c1, c2, -s2, -s1, COS.dtype.element_ty)
    x = DQKV + (token * (HEADS + 2 * KV_HEADS) + head) * D + channel
    tl.store(x, tl.where(turned, x1.to(dtype), v1), mask=inside)
    tl.store(x + D // 2, tl.where(turned, x2.to(dtype), v2), mask=inside)


# --- launchers ----------------------------------------------------------------------------------


def rotary(
    qkv: torch.Tensor,
    bias: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: int,
    kv_heads: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`operations.rotary`, with programs of 2 · HALF_CHANNELS channels."""
    tokens, d = cos.shape
    results = tuple(qkv.new_empty(tokens, count, d) for count in (heads, kv_heads, kv_heads))
    rows, grid, options = _heads(tokens, heads, kv_heads, d, qkv, cos, sin)
    launch(
        _rotary_kernel, grid, qkv.device,
        qkv, qkv.stride(0), bias, cos, cos.stride(0), sin, sin.stride(0), *results, rows,
        **options,
    )  # fmt: skip
    return results


def rotary_backward(
    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """`operations.rotary_backward`, with programs of 2 · HALF_CHANNELS channels."""
    (tokens, heads, d), kv_heads = dq.shape, dk.shape[1]
    dqkv = dq.new_empty(tokens, (heads + 2 * kv_heads) * d)
    rows, grid, options = _heads(tokens, heads, kv_heads, d, dq, dk, dv, cos, sin)
    launch(
        _rotary_backward_kernel, grid, dq.device,
        *[part for x in (dq, dk, dv) for part in (x, x.stride(0), x.stride(1))],
        cos, cos.stride(0), sin, sin.stride(0), dqkv, rows, **options,
    )  # fmt: skip
    return dqkv


def _heads(
    tokens: int, heads: int, kv_heads: int, d: int, *inputs: torch.Tensor
) -> tuple[int, tuple[int], dict[str, int]]:
    """Return how many heads all tokens have, the grid of programs over them, and its options.

    Raises ValueError for more heads than int32 holds, and for channels that are not adjacent.
    """
    rows = tokens * (heads + 2 * kv_heads)
    strides = [x.stride() for x in inputs]
    if rows > MOST_PROGRAMS or any(each[-1] != 1 for each in strides):
        raise ValueError(
            f"{rows} heads of strides {strides}: the channels of a head must be adjacent, and "
            f"there may be {MOST_PROGRAMS} heads"
        )
    half = triton.next_power_of_2(d // 2)
    block = max(1, HALF_CHANNELS // half)
    options = dict(HEADS=heads, KV_HEADS=kv_heads, D=d, HALF=half, ROWS=block, num_warps=WARPS)
    return rows, (triton.cdiv(rows, block),), options
