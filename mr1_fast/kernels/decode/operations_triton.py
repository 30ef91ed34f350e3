"""Sampling, at the end of a decode step, in Triton.

The temperature and the size of the vocabulary are run-time data, and nothing is read on the host,
so a CUDA graph can hold the launches, after a first one outside of it.
"""

import torch
import triton
import triton.language as tl

from ..launch import launch

VOCABULARY_BLOCK = 4096
"""Tokens of a block of logits: the block is drawn first, then a token of it."""
_LOG2E = 1.4426950408889634
_LN2 = tl.constexpr(0.6931471805599453)
_BELOW_ONE = tl.constexpr(1 - 2**-24)

# --- device functions ---------------------------------------------------------------------------


@triton.jit
def _load_logits(X, block, V, BANNED: tl.constexpr, BLOCK: tl.constexpr):
    """Load a block of a row's logits, with −inf for banned tokens."""
    token = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + token, mask=token < V, other=-float("inf")).to(tl.float32)
    for i in tl.static_range(len(BANNED)):
        x = tl.where(token == BANNED[i], -float("inf"), x)
    return x


@triton.jit
def _invert_cdf(weights, uniform, SIZE: tl.constexpr):
    """`_invert_cdf` of reference.py for one row.

    The sums of a scan may fall a little, so that a weight of 0 could be the first whose sum exceeds
    the threshold: it counts as a sum of 0.
    """
    index = tl.arange(0, SIZE)
    cumulative = tl.where(weights > 0, tl.cumsum(weights, 0), 0.0)
    total = tl.max(cumulative, 0)
    threshold = tl.minimum(uniform * total, total * _BELOW_ONE)
    chosen = tl.min(tl.where(cumulative > threshold, index, SIZE - 1), 0)
    weight = tl.sum(tl.where(index == chosen, weights, 0.0), 0)
    before = tl.sum(tl.where(index == chosen, cumulative, 0.0), 0) - weight
    return chosen, tl.maximum((threshold - before) / weight, 0.0)


# --- kernels ------------------------------------------------------------------------------------


@triton.jit
def _block_sums_kernel(
    X, x_stride, PEAKS, SUMS, scale, V, BANNED: tl.constexpr, BLOCK: tl.constexpr
):
    """Compute the peak of one block of a row's logits, and Σ 2^((x − peak)·scale)."""
    row = tl.program_id(0).to(tl.int64)
    x = _load_logits(X + row * x_stride, tl.program_id(1), V, BANNED, BLOCK)
    peak = tl.max(x, 0)
    at = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(PEAKS + at, peak)
    finite_peak = tl.where(peak == -float("inf"), 0.0, peak)
    tl.store(SUMS + at, tl.sum(tl.exp2((x - finite_peak) * scale), 0))


@triton.jit(do_not_specialize_on_alignment=["UNIFORM", "TOKEN", "LOGP"])
def _sample_kernel(X, x_stride, UNIFORM, PEAKS, SUMS, TOKEN, LOGP, scale, V,
                   GREEDY: tl.constexpr, BANNED: tl.constexpr, BLOCK: tl.constexpr,
                   BLOCKS: tl.constexpr, PADDED: tl.constexpr):  # fmt: skip
    """Draw a block of one row, then a token of it, and compute the token's log-probability."""
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, PADDED)
    peaks = tl.load(PEAKS + row * BLOCKS + block, mask=block < BLOCKS, other=-float("inf"))
    sums = tl.load(SUMS + row * BLOCKS + block, mask=block < BLOCKS, other=0.0)
    peak = tl.max(peaks, 0)
    # Without a token to draw, weights are NaN, and so is the log-probability
    weights = sums * tl.exp2((peaks - peak) * scale)
    uniform = 0.0 if GREEDY else tl.load(UNIFORM + row)
    block_weights = tl.where(peaks == peak, 1.0, 0.0) if GREEDY else weights
    block, fraction = _invert_cdf(block_weights, uniform, PADDED)
    x = _load_logits(X + row * x_stride, block, V, BANNED, BLOCK)
    p = tl.exp2((x - tl.max(x, 0)) * scale)
    token_weights = tl.where(x == peak, 1.0, 0.0) if GREEDY else p
    chosen, _ = _invert_cdf(token_weights, fraction, BLOCK)
    y = tl.sum(tl.where(tl.arange(0, BLOCK) == chosen, (x - peak) * scale, 0.0), 0)
    total, top = tl.sum(weights, 0), 0.0
    # Banned tokens count in the sum of all, and may be far above the rest
    for i in tl.static_range(len(BANNED)):
        banned_y = (tl.load(X + row * x_stride + BANNED[i]).to(tl.float32) - peak) * scale
        new_top = tl.maximum(top, banned_y)
        total = total * tl.exp2(top - new_top) + tl.exp2(banned_y - new_top)
        top = new_top
    logp = (y - top - tl.log2(total)) * _LN2
    sound = tl.abs(logp) < float("inf")
    tl.store(TOKEN + row, tl.where(sound, block * BLOCK + chosen, -1).to(tl.int64))
    tl.store(LOGP + row, tl.where(sound, logp, float("nan")))


# --- launchers ----------------------------------------------------------------------------------


def sample(
    logits: torch.Tensor, uniform: torch.Tensor, temperature: float, banned: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`operations.sample`, in two launches.

    The first computes the peak and the sum of each block of VOCABULARY_BLOCK tokens. The second
    draws a block, reads it again from L2, and draws a token of it.
    """
    _check_columns(logits)
    rows, v = logits.shape
    blocks = triton.cdiv(v, VOCABULARY_BLOCK)
    peaks, sums = (logits.new_empty(rows, blocks, dtype=torch.float32) for _ in range(2))
    token = logits.new_empty(rows, dtype=torch.int64)
    logp = logits.new_empty(rows, dtype=torch.float32)
    scale = _LOG2E / (temperature or 1.0)
    constants = dict(BANNED=banned, BLOCK=VOCABULARY_BLOCK)
    launch(
        _block_sums_kernel, (rows, blocks), logits.device,
        logits, logits.stride(0), peaks, sums, scale, v, **constants,
    )  # fmt: skip
    launch(
        _sample_kernel, (rows,), logits.device,
        logits, logits.stride(0), uniform.contiguous(), peaks, sums, token, logp, scale, v,
        GREEDY=temperature == 0, BLOCKS=blocks, PADDED=triton.next_power_of_2(blocks),
        num_warps=8, **constants,
    )  # fmt: skip
    return token, logp


def _check_columns(x: torch.Tensor) -> None:
    """Raise ValueError where the columns of x do not lie side by side, as the kernels expect."""
    if x.stride(-1) != 1:
        raise ValueError(
            f"a tensor of shape {tuple(x.shape)} has strides {x.stride()}, but its columns must be "
            "adjacent"
        )
