"""The norms of heads and the rotary embedding in Triton, forward and backward, in one launch each.

Programs hold heads as rotary_triton.py does: as two halves, which are each other's partners, and
whose squares are added up over the threads that share a head. Forward, each holds some heads of
queries or of keys once. Backward, a fixed number of programs go through the heads in order: first
those of queries, then those of keys, and they copy the gradients of the values. Each adds up its
own part of the weights' gradients in registers, and writes it once. Nothing is added by atomics, so
the same heads give the same bits.

Every channel is read once and written once; backward, the product is read beside the gradients.
"""

import torch
import triton
import triton.language as tl
from triton.runtime import driver

from ..launch import MOST_PROGRAMS, launch, most_registers
from .rotary_triton import load_halves, rotate, store_halves
from .strides import require_adjacent

HALF_CHANNELS = 1024
"""Channels of one half that a program holds, over its heads: 16 heads of 128 channels."""
THREADS = 128
"""Threads of a program: each has 8 channels of each half, so that accesses have 128 bits."""
REGISTERS = 128
"""The most registers of a thread in the backward. On NVIDIA four programs then fill the registers
of a multiprocessor; left alone, the compiler takes 80 and spills some."""
STAGES = 2
"""Heads in flight in a program of the backward: those that are worked on, and the next."""

# --- device functions ---------------------------------------------------------------------------


@triton.jit
def _heads(
    block, tokens, COUNT: tl.constexpr, D: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr
):
    """Return the tokens of a block of heads, which head each is, its channels, and what exists."""
    row = (block * ROWS + tl.arange(0, ROWS))[:, None]
    channel = tl.arange(0, HALF)[None, :]
    mask = (row < tokens * COUNT) & (channel < D // 2)
    return (row // COUNT).to(tl.int64), row % COUNT, channel, mask


@triton.jit
def _standardise(x1, x2, eps, D: tl.constexpr):
    """Return both halves of heads times 1/√(mean square + ε), and that factor."""
    r = tl.rsqrt(tl.sum(x1 * x1 + x2 * x2, 1) / D + eps)[:, None]
    return x1 * r, x2 * r, r


@triton.jit
def _weigh(standard, weight, dtype: tl.constexpr):
    """Apply a weight to standardised channels, which are rounded before and after."""
    return (standard.to(dtype).to(tl.float32) * weight).to(dtype)


@triton.jit
def _turn_heads(
    block, QKV, qkv_token, WEIGHT, eps, COS, cos_stride, SIN, sin_stride, OUT, tokens,
    FIRST: tl.constexpr, COUNT: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Norm and rotate ROWS heads, of which each token has COUNT, in QKV from FIRST on."""
    token, head, channel, mask = _heads(block, tokens, COUNT, D, HALF, ROWS)
    dtype = QKV.dtype.element_ty
    x1, x2 = load_halves(QKV, token * qkv_token + (FIRST + head) * D + channel, mask, D)
    w1, w2 = load_halves(WEIGHT, channel, channel < D // 2, D)
    c1, c2 = load_halves(COS, token * cos_stride + channel, mask, D)
    s1, s2 = load_halves(SIN, token * sin_stride + channel, mask, D)
    x1, x2, _ = _standardise(x1.to(tl.float32), x2.to(tl.float32), eps, D)
    x1, x2 = _weigh(x1, w1.to(tl.float32), dtype), _weigh(x2, w2.to(tl.float32), dtype)
    x1, x2 = rotate(x1, x2, c1, c2, s1, s2, COS.dtype.element_ty, False)
    at = (token * COUNT + head) * D + channel
    store_halves(OUT, at, x1.to(dtype), x2.to(dtype), mask, D)


@triton.jit
def _turn_heads_back(
    DX, dx_token, dx_head, QKV, qkv_token, WEIGHT, eps, COS, cos_stride, SIN, sin_stride,
    DQKV, PARTIAL, tokens,
    FIRST: tl.constexpr, COUNT: tl.constexpr, WIDTH: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Go through every n-th block of heads, n being the number of programs.

    DX is the gradient by the normed and rotated heads; nothing is rounded until the end.
    """
    columns = tl.arange(0, HALF)[None, :]
    inside = columns < D // 2
    w1, w2 = load_halves(WEIGHT, columns, inside, D)
    w1, w2 = w1.to(tl.float32), w2.to(tl.float32)
    sum1 = tl.zeros((ROWS, HALF), tl.float32)
    sum2 = tl.zeros((ROWS, HALF), tl.float32)
    blocks = tl.cdiv(tokens * COUNT, ROWS)
    for block in tl.range(tl.program_id(0), blocks, tl.num_programs(0), num_stages=STAGES):
        token, head, channel, mask = _heads(block, tokens, COUNT, D, HALF, ROWS)
        in_qkv = (FIRST + head) * D + channel
        g1, g2 = load_halves(DX, token * dx_token + head.to(tl.int64) * dx_head + channel, mask, D)
        x1, x2 = load_halves(QKV, token * qkv_token + in_qkv, mask, D)
        c1, c2 = load_halves(COS, token * cos_stride + channel, mask, D)
        s1, s2 = load_halves(SIN, token * sin_stride + channel, mask, D)
        g1, g2 = rotate(g1, g2, c1, c2, s1, s2, tl.float32, True)
        x1, x2, r = _standardise(x1.to(tl.float32), x2.to(tl.float32), eps, D)
        if PARTIAL is not None:
            sum1 += g1 * x1
            sum2 += g2 * x2
        g1 *= w1
        g2 *= w2
        slope = (tl.sum(g1 * x1 + g2 * x2, 1) / D)[:, None]
        dtype = DQKV.dtype.element_ty
        y1, y2 = ((g1 - x1 * slope) * r).to(dtype), ((g2 - x2 * slope) * r).to(dtype)
        store_halves(DQKV, token * (WIDTH * D) + in_qkv, y1, y2, mask, D)
    if PARTIAL is not None:
        sum1, sum2 = tl.sum(sum1, 0)[None, :], tl.sum(sum2, 0)[None, :]
        store_halves(PARTIAL, columns, sum1, sum2, inside, D)


# --- kernels ------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["tokens"])
def _norm_rotary_kernel(
    QKV, qkv_token, Q_WEIGHT, K_WEIGHT, eps, COS, cos_stride, SIN, sin_stride, Q, K, tokens,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Norm and rotate from QKV to Q and K."""
    program = tl.program_id(0)
    k_program = program - tl.cdiv(tokens * HEADS, ROWS)
    if k_program < 0:
        _turn_heads(
            program, QKV, qkv_token, Q_WEIGHT, eps, COS, cos_stride, SIN, sin_stride, Q, tokens,
            0, HEADS, D, HALF, ROWS,
        )  # fmt: skip
    else:
        _turn_heads(
            k_program, QKV, qkv_token, K_WEIGHT, eps, COS, cos_stride, SIN, sin_stride, K, tokens,
            HEADS, KV_HEADS, D, HALF, ROWS,
        )  # fmt: skip


@triton.jit(do_not_specialize=["tokens"])
def _norm_rotary_backward_kernel(
    DQ, dq_token, dq_head, DK, dk_token, dk_head, DV, dv_token, dv_head,
    QKV, qkv_token, Q_WEIGHT, K_WEIGHT, eps, COS, cos_stride, SIN, sin_stride,
    DQKV, PARTIAL, tokens,
    HEADS: tl.constexpr, KV_HEADS: tl.constexpr,
    D: tl.constexpr, HALF: tl.constexpr, ROWS: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Compute the gradient by QKV, and this program's part of those by both weights."""
    WIDTH: tl.constexpr = HEADS + 2 * KV_HEADS
    q_sums, k_sums = PARTIAL, PARTIAL
    if PARTIAL is not None:
        q_sums = PARTIAL + tl.program_id(0) * (2 * D)
        k_sums = q_sums + D
    _turn_heads_back(
        DQ, dq_token, dq_head, QKV, qkv_token, Q_WEIGHT, eps, COS, cos_stride, SIN, sin_stride,
        DQKV, q_sums, tokens, 0, HEADS, WIDTH, D, HALF, ROWS, STAGES,
    )  # fmt: skip
    _turn_heads_back(
        DK, dk_token, dk_head, QKV, qkv_token, K_WEIGHT, eps, COS, cos_stride, SIN, sin_stride,
        DQKV, k_sums, tokens, HEADS, KV_HEADS, WIDTH, D, HALF, ROWS, STAGES,
    )  # fmt: skip
    blocks = tl.cdiv(tokens * KV_HEADS, ROWS)
    for block in tl.range(tl.program_id(0), blocks, tl.num_programs(0), num_stages=STAGES):
        token, head, channel, mask = _heads(block, tokens, KV_HEADS, D, HALF, ROWS)
        at = token * dv_token + head.to(tl.int64) * dv_head + channel
        x1, x2 = load_halves(DV, at, mask, D)
        at = token * (WIDTH * D) + (HEADS + KV_HEADS + head) * D + channel
        store_halves(DQKV, at, x1, x2, mask, D)


# --- launchers ----------------------------------------------------------------------------------


def norm_rotary(
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    heads: int,
    kv_heads: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`operations.norm_rotary`, with programs of 2 · HALF_CHANNELS channels."""
    tokens, d = cos.shape
    require_adjacent(qkv, cos, sin)
    q, k = (qkv.new_empty(tokens, count, d) for count in (heads, kv_heads))
    options = _options(tokens, heads, d, backward=False)
    programs = sum(triton.cdiv(tokens * count, options["ROWS"]) for count in (heads, kv_heads))
    launch(
        _norm_rotary_kernel, (programs,), qkv.device,
        qkv, qkv.stride(0), q_weight, k_weight, eps, cos, cos.stride(0), sin, sin.stride(0),
        q, k, tokens, HEADS=heads, KV_HEADS=kv_heads, **options,
    )  # fmt: skip
    return q, k


def norm_rotary_backward(
    dq: torch.Tensor,
    dk: torch.Tensor,
    dv: torch.Tensor,
    qkv: torch.Tensor,
    q_weight: torch.Tensor,
    k_weight: torch.Tensor,
    eps: float,
    cos: torch.Tensor,
    sin: torch.Tensor,
    with_weights: bool,
    parts: int,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`operations.norm_rotary_backward`, with as many programs as there are `parts`."""
    require_adjacent(dq, dk, dv, qkv, cos, sin)
    (tokens, heads, d), kv_heads = dq.shape, dk.shape[1]
    dqkv = qkv.new_empty(qkv.shape)
    partial = qkv.new_empty((parts, 2, d) if with_weights else 0, dtype=torch.float32)
    launch(
        _norm_rotary_backward_kernel, (parts,), qkv.device,
        *[part for x in (dq, dk, dv) for part in (x, x.stride(0), x.stride(1))],
        qkv, qkv.stride(0), q_weight, k_weight, eps, cos, cos.stride(0), sin, sin.stride(0),
        dqkv, partial if with_weights else None, tokens,
        HEADS=heads, KV_HEADS=kv_heads, STAGES=STAGES,
        **_options(tokens, heads, d, backward=True),
    )  # fmt: skip
    return dqkv, partial


def _options(tokens: int, heads: int, d: int, backward: bool) -> dict[str, int]:
    """Return the block of a program; raise ValueError for more heads than int32 counts."""
    if tokens * heads > MOST_PROGRAMS:
        raise ValueError(f"{tokens * heads} heads are more than a launch counts ({MOST_PROGRAMS})")
    half = triton.next_power_of_2(d // 2)
    options = dict(D=d, HALF=half, ROWS=max(1, HALF_CHANNELS // half))
    if not triton.knobs.runtime.interpret:
        options["num_warps"] = THREADS // driver.active.get_current_target().warp_size
    return options | (most_registers(REGISTERS) if backward else {})
