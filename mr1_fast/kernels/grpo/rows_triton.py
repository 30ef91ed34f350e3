"""The row operations in Triton: kernels and launchers; device_triton.py has their device functions.

A program owns a row of logits, or a part of one. Its first sweep reads the columns once and keeps
max, Σ exp and Σ exp·x, after which everything about the token's loss is known; its second sweep
reads the columns again, from L2, and writes the gradient. Device memory sees one read and one write
as long as the rows in flight fit in L2. Where they would not (the 6 MB of a 3090), a row is split
over programs, which wait for each other between the sweeps.

β, temperature and the clip bounds are run-time data, and so is the number of rows: nothing is
compiled again when they change. Only what a model or a run fixes (V, dtype, surrogate, which inputs
exist) selects a kernel.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from ..dispatch import statistics_dtype
from ..launch import launch
from .device_triton import (
    BANNED,
    LN2,
    gather_parts,
    load_target,
    logprob_entropy,
    statistics,
    token_loss,
    write_gradient,
)
from .objective import Objective, RowResults

BLOCK = 4096
"""Columns of 16-bit logits that a program handles at a time."""

NUM_WARPS = 8

PROGRAMS_PER_SM = 2
"""Programs on 16-bit logits that a multiprocessor has the registers for.

It holds twice as many on fp32, whose blocks have half the columns. benchmarks/compile_table.py
prints the registers.
"""

INTERPRETED = bool(triton.knobs.runtime.interpret)
LOG2E = tl.constexpr(1.4426950408889634)

# --- kernels ------------------------------------------------------------------------------------

# A slice of these may start at any address, which must not select a kernel of its own.
_ANY_ALIGNMENT = [
    "TARGET", "ADVANTAGE", "WEIGHT", "OLD", "REF", "IS_WEIGHT", "BETA", "TEMPERATURE", "FACTOR",
    "LOSS", "LOGP", "ENTROPY", "KL", "CLIPPED", "KL_LIMITED", "PARTIALS", "ARRIVED",
    "PEAK", "LOG_SUM", "GRAD_LOGP", "GRAD_ENTROPY",
]  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def _grpo_kernel(
    X, x_stride, OUT, out_stride, TARGET, ADVANTAGE, WEIGHT, OLD, REF, IS_WEIGHT, BETA, TEMPERATURE,
    clip_low, clip_high, delta, tau_positive, tau_negative,
    LOSS, LOGP, ENTROPY, KL, CLIPPED, KL_LIMITED, PARTIALS, ARRIVED, V,
    SURROGATE: tl.constexpr, BIAS_CORRECTED: tl.constexpr, PARTS: tl.constexpr,
    PADDED: tl.constexpr, PART_COLUMNS: tl.constexpr, PHASE: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) // PARTS
    part = tl.program_id(0) % PARTS
    start = part * PART_COLUMNS
    stop = tl.minimum(start + PART_COLUMNS, V)
    row = X + n * x_stride
    target = tl.load(TARGET + n)
    temperature = tl.load(TEMPERATURE)
    scale = LOG2E / temperature
    x_target = 0.0
    m = 0.0
    s = 0.0
    u = 0.0
    if PHASE != 2:
        x_target = load_target(row, target, V)
        m, s, u = statistics(row, start, stop, scale, BLOCK)
    complete = True
    if PARTS > 1:
        x_target, m, s, u, complete = gather_parts(
            PARTIALS + n * PARTS * 4, x_target, part, ARRIVED + n, m, s, u, scale, PARTS, PADDED,
            PHASE
        )  # fmt: skip
    if PHASE != 1:
        logp, entropy, log2_s = logprob_entropy(x_target, m, s, u, scale)
        old_logp = logp
        if OLD is not None:
            old_logp = tl.load(OLD + n)
        ref_logp = 0.0
        if REF is not None:
            ref_logp = tl.load(REF + n)
        is_weight = 1.0
        if IS_WEIGHT is not None:
            is_weight = tl.load(IS_WEIGHT + n)
        loss, derivative, kl, clipped, kl_limited = token_loss(
            logp, tl.load(ADVANTAGE + n), tl.load(WEIGHT + n), old_logp, ref_logp, is_weight,
            tl.load(BETA), clip_low, clip_high, delta, tau_positive, tau_negative,
            SURROGATE, REF is not None, BIAS_CORRECTED,
        )  # fmt: skip
        if part == 0:
            tl.store(LOSS + n, loss)
            tl.store(LOGP + n, logp)
            tl.store(ENTROPY + n, entropy)
            tl.store(KL + n, kl)
            tl.store(CLIPPED + n, clipped.to(tl.uint8))
            tl.store(KL_LIMITED + n, kl_limited.to(tl.uint8))
        if OUT is not None:
            coefficient = derivative / temperature
            coefficient = tl.where(tl.abs(coefficient) < float("inf"), coefficient, 0.0)
            # Where a part did not come, the others may have written a finite gradient.
            coefficient = tl.where(complete, coefficient, float("nan"))
            column = target.to(tl.int32)  # 64-bit comparisons in the sweep would be slow.
            write_gradient(
                row, OUT + n * out_stride, column, start, stop, scale, m, log2_s, coefficient, BLOCK
            )


@triton.jit(do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def _logprobs_kernel(
    X, x_stride, TARGET, TEMPERATURE, WEIGHT, LOGP, ENTROPY, PEAK, LOG_SUM, V, BLOCK: tl.constexpr
):
    n = tl.program_id(0).to(tl.int64)
    if WEIGHT is not None:  # noqa: SIM102
        if tl.load(WEIGHT + n) == 0:
            tl.store(LOGP + n, 0.0)
            tl.store(ENTROPY + n, 0.0)
            tl.store(PEAK + n, 0.0)
            tl.store(LOG_SUM + n, 0.0)
            return
    row = X + n * x_stride
    scale = LOG2E / tl.load(TEMPERATURE)
    x_target = load_target(row, tl.load(TARGET + n), V)
    m, s, u = statistics(row, 0, V, scale, BLOCK)
    logp, entropy, log2_s = logprob_entropy(x_target, m, s, u, scale)
    tl.store(LOGP + n, logp)
    tl.store(ENTROPY + n, entropy)
    tl.store(PEAK + n, m)
    tl.store(LOG_SUM + n, log2_s * LN2)


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


@triton.jit(do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def _scale_kernel(X, FACTOR, size, BLOCK: tl.constexpr):
    factor = tl.load(FACTOR)
    if factor != 1:
        start = tl.program_id(0).to(tl.int64) * BLOCK
        while start < size:
            offsets = start + tl.arange(0, BLOCK)
            x = tl.load(X + offsets, mask=offsets < size).to(tl.float32)
            tl.store(X + offsets, (x * factor).to(X.dtype.element_ty), mask=offsets < size)
            start += tl.num_programs(0).to(tl.int64) * BLOCK


# --- launchers ----------------------------------------------------------------------------------


def row_grpo(
    logits: torch.Tensor,
    targets: torch.Tensor,
    objective: Objective,
    results: RowResults,
    out: torch.Tensor | None,
    parts: int | None = None,
) -> None:
    """`rows.row_grpo` for logits (N, V) with unit column stride.

    `parts`: programs per row; None: as many as L2 needs.
    """
    n, v = logits.shape
    part_columns = split_columns(logits, parts)
    parts = triton.cdiv(v, part_columns)
    partials = arrived = None
    if parts > 1:
        partials = logits.new_empty(n, parts, 4, dtype=torch.float32)
        arrived = logits.new_zeros(n, dtype=torch.int32)
    # The interpreter runs one program after the other, which cannot wait: there, the sweeps are two
    # launches.
    phases = (1, 2) if parts > 1 and INTERPRETED else (0,)
    for phase in phases:
        launch(
            _grpo_kernel,
            (n * parts,),
            logits.device,
            logits, logits.stride(0), out, 0 if out is None else out.stride(0), targets,
            objective.advantages, objective.token_weights,
            objective.old_logp, objective.ref_logp, objective.is_weights,
            objective.beta, objective.temperature,
            objective.clip_low, objective.clip_high, objective.delta,
            objective.tau_positive, objective.tau_negative,
            results.loss, results.logp, results.entropy, results.kl,
            results.clipped.view(torch.uint8), results.kl_limited.view(torch.uint8),
            partials, arrived, v,
            SURROGATE=objective.surrogate, BIAS_CORRECTED=objective.bias_corrected_kl,
            PARTS=parts, PADDED=triton.next_power_of_2(parts), PART_COLUMNS=part_columns,
            PHASE=phase, BLOCK=block_size(logits), num_warps=NUM_WARPS,
        )  # fmt: skip


def row_logprobs(
    logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: torch.Tensor,
    token_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """`rows.row_logprobs`: one program per row, one read."""
    n, v = logits.shape
    outputs = tuple(logits.new_empty(n, dtype=statistics_dtype(logits)) for _ in range(4))
    launch(
        _logprobs_kernel,
        (n,),
        logits.device,
        logits, logits.stride(0), targets, temperature, token_weights, *outputs, v,
        BLOCK=block_size(logits), num_warps=NUM_WARPS,
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
    block = block_size(logits)
    launch(
        _logprobs_backward_kernel,
        (n * triton.cdiv(v, block),),
        logits.device,
        logits, logits.stride(0), out, out.stride(0), targets, temperature,
        entropy, peak, log_sum, grad_logp, grad_entropy, v,
        BLOCK=block, num_warps=NUM_WARPS,
    )  # fmt: skip


def scale_(gradient: torch.Tensor, factor: torch.Tensor) -> None:
    """`rows.scale_` of a contiguous tensor; programs end at once where the factor is 1."""
    size = gradient.numel()
    programs = min(triton.cdiv(size, BLOCK), 2048)
    options = dict(BLOCK=BLOCK, num_warps=NUM_WARPS)
    launch(_scale_kernel, (programs,), gradient.device, gradient, factor, size, **options)


def split_columns(logits: torch.Tensor, parts: int | None = None) -> int:
    """Return the columns per program, in whole blocks: so few that rows in flight fit in L2.

    `parts` forces the number of programs per row. The number of rows plays no part, since every
    choice is a compilation of its own.
    """
    block = block_size(logits)
    if parts is None:
        multiprocessors, l2_bytes = _device_limits(logits.device)
        row_bytes = logits.shape[1] * logits.element_size()
        programs = multiprocessors * PROGRAMS_PER_SM * logits.element_size() // 2
        # Half of a row is alive on average: a margin of 2. All parts of a row must run at once.
        parts = min(round(programs * row_bytes / l2_bytes), multiprocessors)
    return triton.cdiv(triton.cdiv(logits.shape[1], block), max(1, parts)) * block


def block_size(logits: torch.Tensor) -> int:
    """Return the columns that a program handles at a time.

    They have as many bytes in every dtype, since registers are the limit.
    """
    v = logits.shape[1]
    if INTERPRETED:
        # A block costs a millisecond, whatever its size; there are still several, so that loops
        # run.
        return min(65536, triton.next_power_of_2(triton.cdiv(v, 3)))
    return min(BLOCK * 2 // logits.element_size(), triton.next_power_of_2(v))


@lru_cache
def _device_limits(device: torch.device) -> tuple[int, int]:
    """Return how many multiprocessors the device has, and the bytes of its L2."""
    if device.type != "cuda":
        return 1, 2**40
    properties = torch.cuda.get_device_properties(device)
    return properties.multi_processor_count, properties.L2_cache_size
