"""The rotary embedding in Triton, forward and backward, in one launch each.

Programs work on queries first, then on keys, then on values. Each holds some heads, counted over
all tokens, as their two halves, which are each other's partners: every channel is read once and
written once, in both passes. A token's angles, and the bias, are read again for each of its heads,
from the L1 cache. Sections of M-RoPE and the two dimensions of patches are in the angles. Heads of
any even width work: their halves are padded to a power of two, and what is beyond them is neither
read nor written.
"""

import torch
import triton
import triton.language as tl

from ..launch import MOST_PROGRAMS, launch
from .strides import require_adjacent

HALF_CHANNELS = 1024
"""Channels of one half that a program holds, over its heads: 16 heads of 128 channels."""
WARPS = 2
"""Warps of a program: a thread has 16 channels of each half, and 8 on AMD, so that accesses have
128 bits."""
UNIT = 8
"""Channels in which strides are counted where they can: so the compiler sees that accesses may be
wide where a head has a multiple of 8 channels but not of 16, as Qwen3-VL-8B's tower has with 72."""

# --- device functions ---------------------------------------------------------------------------


@triton.jit
def load_halves(X, at, mask, D: tl.constexpr):
    """Load the channels `at` of the first half, and their partners in the second."""
    return tl.load(X + at, mask=mask, other=0.0), tl.load(X + at + D // 2, mask=mask, other=0.0)


@triton.jit
def store_halves(X, at, x1, x2, mask, D: tl.constexpr):
    """Store the channels `at` of the first half, and their partners in the second."""
    tl.store(X + at, x1, mask=mask)
    tl.store(X + at + D // 2, x2, mask=mask)


@triton.jit
def rotate(x1, x2, c1, c2, s1, s2, dtype: tl.constexpr, BACKWARD: tl.constexpr):
    """Compute x·cos + (−x2, x1)·sin of both halves; x, products and sums are rounded to dtype.

    BACKWARD is the transposed rotation: each sine moves to the channel that it multiplied.
    """
    x1 = x1.to(dtype).to(tl.float32)
    x2 = x2.to(dtype).to(tl.float32)
    c1 = c1.to(tl.float32)
    c2 = c2.to(tl.float32)
    s1 = s1.to(tl.float32)
    s2 = s2.to(tl.float32)
    if BACKWARD:
        s1, s2 = -s2, -s1
    y1 = (x1 * c1).to(dtype).to(tl.float32) - (x2 * s1).to(dtype).to(tl.float32)
    y2 = (x2 * c2).to(dtype).to(tl.float32) + (x1 * s2).to(dtype).to(tl.float32)
    return y1.to(dtype), y2.to(dtype)


@triton.jit
def _move_heads(
    program, QKV, qkv_token, BIAS, COS, cos_stride, SIN, sin_stride, X, x_token, x_head, tokens,
    FIRST: tl.constexpr, COUNT: tl.constexpr, TURNED: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, BACKWARD: tl.constexpr,
):  # fmt: skip
    """Rotate ROWS heads from QKV to X, or their gradients from X to QKV; if not TURNED, copy them.

    Heads are counted over all tokens, each of which has COUNT in X, and from FIRST on in QKV.
    """
    row = (program * ROWS + tl.arange(0, ROWS))[:, None]
    channel = tl.arange(0, HALF)[None, :]
    mask = (row < tokens * COUNT) & (channel < D // 2)
    token = (row // COUNT).to(tl.int64)
    head = row % COUNT
    in_qkv = token * qkv_token + (FIRST + head) * D + channel
    in_x = token * x_token + head.to(tl.int64) * x_head + channel
    dtype = QKV.dtype.element_ty
    if BACKWARD:
        x1, x2 = load_halves(X, in_x, mask, D)
    else:
        x1, x2 = load_halves(QKV, in_qkv, mask, D)
    if BIAS is not None:
        b1, b2 = load_halves(BIAS, (FIRST + head) * D + channel, mask, D)
        x1 = (x1.to(tl.float32) + b1.to(tl.float32)).to(dtype)
        x2 = (x2.to(tl.float32) + b2.to(tl.float32)).to(dtype)
    if TURNED:
        c1, c2 = load_halves(COS, token * cos_stride + channel, mask, D)
        s1, s2 = load_halves(SIN, token * sin_stride + channel, mask, D)
        x1, x2 = rotate(x1, x2, c1, c2, s1, s2, COS.dtype.element_ty, BACKWARD)
    if BACKWARD:
        store_halves(QKV, in_qkv, x1.to(dtype), x2.to(dtype), mask, D)
    else:
        store_halves(X, in_x, x1.to(dtype), x2.to(dtype), mask, D)


# --- kernel -------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["tokens"])
def _rotary_kernel(
    QKV, qkv_token, BIAS, COS, cos_stride, SIN, sin_stride,
    Q, q_token, q_head, K, k_token, k_head, V, v_token, v_head, tokens,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr,
    ROWS: tl.constexpr, BACKWARD: tl.constexpr, UNIT: tl.constexpr,
):  # fmt: skip
    """Rotate from QKV to Q, K and V, or their gradients back to QKV; strides are in UNITs."""
    qkv_token, cos_stride, sin_stride = qkv_token * UNIT, cos_stride * UNIT, sin_stride * UNIT
    q_token, q_head = q_token * UNIT, q_head * UNIT
    k_token, k_head = k_token * UNIT, k_head * UNIT
    v_token, v_head = v_token * UNIT, v_head * UNIT
    program = tl.program_id(0)
    k_program = program - tl.cdiv(tokens * HEADS, ROWS)
    v_program = k_program - tl.cdiv(tokens * KV_HEADS, ROWS)
    if k_program < 0:
        _move_heads(
            program, QKV, qkv_token, BIAS, COS, cos_stride, SIN, sin_stride,
            Q, q_token, q_head, tokens, 0, HEADS, True, D, HALF, ROWS, BACKWARD,
        )  # fmt: skip
    elif v_program < 0:
        _move_heads(
            k_program, QKV, qkv_token, BIAS, COS, cos_stride, SIN, sin_stride,
            K, k_token, k_head, tokens, HEADS, KV_HEADS, True, D, HALF, ROWS, BACKWARD,
        )  # fmt: skip
    else:
        _move_heads(
            v_program, QKV, qkv_token, BIAS, COS, cos_stride, SIN, sin_stride,
            V, v_token, v_head, tokens, HEADS + KV_HEADS, KV_HEADS, False, D, HALF, ROWS, BACKWARD,
        )  # fmt: skip


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
    _launch(qkv, bias, cos, sin, *results, backward=False)
    return results


def rotary_backward(
    dq: torch.Tensor, dk: torch.Tensor, dv: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor
) -> torch.Tensor:
    """`operations.rotary_backward`, with programs of 2 · HALF_CHANNELS channels."""
    tokens, heads, d = dq.shape
    dqkv = dq.new_empty(tokens, (heads + 2 * dk.shape[1]) * d)
    _launch(dqkv, None, cos, sin, dq, dk, dv, backward=True)
    return dqkv


def _launch(
    qkv: torch.Tensor,
    bias: torch.Tensor | None,
    cos: torch.Tensor,
    sin: torch.Tensor,
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    backward: bool,
) -> None:
    """Run the kernel over all heads; raise ValueError for more of them than int32 counts."""
    (tokens, heads, d), kv_heads = q.shape, k.shape[1]
    if tokens * heads > MOST_PROGRAMS:
        raise ValueError(f"{tokens * heads} heads are more than a launch counts ({MOST_PROGRAMS})")
    require_adjacent(qkv, cos, sin, q, k, v)
    half = triton.next_power_of_2(d // 2)
    rows = max(1, HALF_CHANNELS // half)
    programs = triton.cdiv(tokens * heads, rows) + 2 * triton.cdiv(tokens * kv_heads, rows)
    strides = [x.stride(0) for x in (qkv, cos, sin)]
    strides += [stride for x in (q, k, v) for stride in x.stride()[:2]]
    unit = UNIT if all(stride % UNIT == 0 for stride in strides) else 1
    on_qkv, on_cos, on_sin, *on_heads = (stride // unit for stride in strides)
    launch(
        _rotary_kernel, (programs,), qkv.device,
        qkv, on_qkv, bias, cos, on_cos, sin, on_sin,
        q, *on_heads[:2], k, *on_heads[2:4], v, *on_heads[4:], tokens,
        HEADS=heads, KV_HEADS=kv_heads, D=d, HALF=half, ROWS=rows, BACKWARD=backward, UNIT=unit,
        num_warps=WARPS,
    )  # fmt: skip
