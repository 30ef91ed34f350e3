"""Log-probabilities and entropy of rows of logits, and their gradient, in Triton.

Forward, one warp streams through a row: it reads the row once, keeps loads in flight, and never
waits at a barrier. A row of weight 0 is not read. Backward, a program owns a block of a row, and a
row without an incoming gradient is not read.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..dispatch import statistics_dtype
from ..launch import launch
from ..tuned import tuned
from .device_triton import (
    BANNED,
    INTERPRETED,
    LN2,
    LOG2E,
    interpreted_block,
    load_target,
    logprob_entropy,
    stream_sums,
)


class LogprobsTile(NamedTuple):
    """The block of a row that a program of the log-probabilities reads at a time."""

    block: int
    """16-bit logits of a block; it has half as many in fp32."""

    warps: int

    stages: int
    """Blocks that are loaded ahead."""


LOGPROBS_VARIANTS = (
    LogprobsTile(1024, 1, 3),
    LogprobsTile(1024, 1, 4),
    LogprobsTile(2048, 1, 3),
    LogprobsTile(2048, 2, 3),
    LogprobsTile(4096, 4, 3),
)
"""Settings that a sweep tries; the first is the one by arithmetic: 32 programs on a multiprocessor
with 4 KB in flight each."""

BACKWARD_BLOCK = 4096
"""16-bit logits of a block of the gradient; half as many in fp32."""

BACKWARD_WARPS = 8

# --- kernels ------------------------------------------------------------------------------------

# A slice of these may start at any address, which must not select a kernel of its own.
_ANY_ALIGNMENT = [
    "TARGET", "TEMPERATURE", "WEIGHT", "LOGP", "ENTROPY", "PEAK", "LOG_SUM", "GRAD_LOGP",
    "GRAD_ENTROPY",
]  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def _logprobs_kernel(
    X, x_stride, TARGET, TEMPERATURE, WEIGHT, LOGP, ENTROPY, PEAK, LOG_SUM, V,
    BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64)
    counts = True
    if WEIGHT is not None:
        counts = tl.load(WEIGHT + n) != 0
    if counts:
        row = X + n * x_stride
        scale = LOG2E / tl.load(TEMPERATURE)
        x_target = load_target(row, tl.load(TARGET + n), V)
        m, k, s, u = stream_sums(row, V, scale, BLOCK, STAGES)
        logp, entropy, log2_s = logprob_entropy(x_target, k, s, u, scale)
        tl.store(LOGP + n, logp)
        tl.store(ENTROPY + n, entropy)
        tl.store(PEAK + n, m)
        # The sums are relative to k, which is m·scale but for its rounding.
        tl.store(LOG_SUM + n, (log2_s - tl.fma(m, scale, -k)) * LN2)
    else:
        tl.store(LOGP + n, 0.0)
        tl.store(ENTROPY + n, 0.0)
        tl.store(PEAK + n, 0.0)
        tl.store(LOG_SUM + n, 0.0)


@triton.jit(do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def _logprobs_backward_kernel(
    X, x_stride, OUT, out_stride, TARGET, TEMPERATURE, ENTROPY, PEAK, LOG_SUM,
    GRAD_LOGP, GRAD_ENTROPY, V, BLOCK: tl.constexpr,
):  # fmt: skip
    blocks = tl.cdiv(V, BLOCK)
    n = tl.program_id(0).to(tl.int64) // blocks
    columns = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < V
    out = OUT + n * out_stride + columns
    log_sum = tl.load(LOG_SUM + n)
    grad_logp = tl.load(GRAD_LOGP + n)
    grad_entropy = tl.load(GRAD_ENTROPY + n)
    target = tl.load(TARGET + n)
    dead = (
        ((grad_logp == 0) & (grad_entropy == 0))
        | ~(tl.abs(log_sum) < float("inf"))
        | (target < 0)
        | (target >= V)
    )
    if dead:
        tl.store(out, tl.zeros((BLOCK,), tl.float32).to(OUT.dtype.element_ty), mask=mask)
    else:
        temperature = tl.load(TEMPERATURE)
        x = tl.load(X + n * x_stride + columns, mask=mask, other=-float("inf"))
        logp = (x.to(tl.float32) - tl.load(PEAK + n)) / temperature - log_sum
        p = tl.exp(logp)
        entropy_part = grad_entropy * (tl.maximum(logp, BANNED) + tl.load(ENTROPY + n))
        gradient = tl.where(columns == target.to(tl.int32), grad_logp, 0.0) - p * (
            grad_logp + entropy_part
        )
        tl.store(out, (gradient / temperature).to(OUT.dtype.element_ty), mask=mask)


# --- launchers ----------------------------------------------------------------------------------


def row_logprobs(
    logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: torch.Tensor,
    token_weights: torch.Tensor | None = None,
    tile: LogprobsTile | None = None,
) -> tuple[torch.Tensor, ...]:
    """`rows.row_logprobs`: one program per row, one read; none for a row of weight 0.

    `tile`: the launch setting; None: the one of this architecture.
    """
    n, v = logits.shape
    tile = tile or _default_tile(logits)
    outputs = tuple(logits.new_empty(n, dtype=statistics_dtype(logits)) for _ in range(4))
    launch(
        _logprobs_kernel,
        (n,),
        logits.device,
        logits, logits.stride(0), targets, temperature, token_weights, *outputs, v,
        BLOCK=min(tile.block * 2 // logits.element_size(), triton.next_power_of_2(v)),
        STAGES=tile.stages, num_warps=tile.warps,
    )  # fmt: skip
    return outputs


def row_logprobs_backward(
    logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: torch.Tensor,
    entropy: torch.Tensor,
    peak: torch.Tensor,
    log_sum: torch.Tensor,
    grad_logp: torch.Tensor,
    grad_entropy: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """`rows.row_logprobs_backward`: one program per block of a row."""
    n, v = logits.shape
    block = BACKWARD_BLOCK * 2 // logits.element_size()
    block = interpreted_block(logits) if INTERPRETED else min(block, triton.next_power_of_2(v))
    launch(
        _logprobs_backward_kernel,
        (n * triton.cdiv(v, block),),
        logits.device,
        logits, logits.stride(0), out, out.stride(0), targets, temperature,
        entropy, peak, log_sum, grad_logp, grad_entropy, v,
        BLOCK=block, num_warps=BACKWARD_WARPS,
    )  # fmt: skip


def _default_tile(logits: torch.Tensor) -> LogprobsTile:
    if INTERPRETED:
        return LogprobsTile(interpreted_block(logits) * logits.element_size() // 2, 1, 3)
    return tuned("logprobs", logits.device, LOGPROBS_VARIANTS[0])
