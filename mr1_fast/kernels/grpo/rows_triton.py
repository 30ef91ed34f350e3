"""The row operations in Triton: kernels and launchers; device_triton.py has their device functions.

The loss with its gradient moves every logit once in and once out of device memory, whatever L2
holds. A row is cut into parts of some thousand columns. The program of a part loads it into
registers at once, publishes its maximum and sums, waits for those of the row's other parts, after
which everything about the token's loss is known, and writes the gradient from the registers.

The loss without a gradient is made of log-probabilities, whose kernels are in logprobs_triton.py.

β, temperature and the clip bounds are run-time data, and so is the number of rows: nothing is
compiled again when they change. Only what a model or a run fixes (V, dtype, surrogate, which inputs
exist) selects a kernel.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.runtime.driver import driver

from ..launch import launch
from ..tuned import tuned
from .device_triton import (
    INTERPRETED,
    LOG2E,
    block_sums,
    gather,
    interpreted_block,
    load_target,
    logprob_entropy,
    origin_of,
    publish,
    token_loss,
    word,
)
from .logprobs_triton import row_logprobs, row_logprobs_backward
from .objective import Objective, RowResults
from .reference import objective_loss_ref

__all__ = ["row_grpo", "row_logprobs", "row_logprobs_backward", "scale_"]


class LossTile(NamedTuple):
    """The part of a row that a program of the loss holds in registers."""

    columns: int
    """16-bit logits of a part; it has half as many in fp32, which are as many bytes."""

    warps: int

    registers: int
    """Most registers of a thread, by which more programs fit on a multiprocessor; 0: no limit."""


LOSS_VARIANTS = (
    LossTile(8192, 4, 96),
    LossTile(8192, 4, 0),
    LossTile(8192, 8, 0),
    LossTile(4096, 4, 0),
    LossTile(16384, 8, 96),
)
"""Settings that a sweep tries; the first is the one by arithmetic.

It has 96 registers, so 5 programs and 80 KB in flight on a multiprocessor, where 40 KB would hide
the latency of an H100's memory. With 80 registers it would spill.
"""

SPIN_LIMIT = 1 << 20
"""How often a program looks whether the other parts of its row have published their sums.

It is about a second, after which the row's loss is NaN: a wait that cannot end is no hang.
"""

SCALE_BLOCK = 4096
"""Elements of a gradient that a program scales at a time."""

PHASES = (1, 2) if INTERPRETED else (0,)
"""Launches of the loss: one, or publishing and the rest in two.

The interpreter runs one program after the other, which cannot wait for each other.
"""

# --- kernels ------------------------------------------------------------------------------------

# A slice of these may start at any address, which must not select a kernel of its own.
_ANY_ALIGNMENT = [
    "TARGET", "ADVANTAGE", "WEIGHT", "OLD", "REF", "IS_WEIGHT", "BETA", "TEMPERATURE", "FACTOR",
    "LOSS", "LOGP", "ENTROPY", "KL", "CLIPPED", "KL_LIMITED", "WORDS",
]  # fmt: skip


@triton.jit(do_not_specialize_on_alignment=_ANY_ALIGNMENT)
def _grpo_kernel(
    X, x_stride, OUT, out_stride, TARGET, ADVANTAGE, WEIGHT, OLD, REF, IS_WEIGHT, BETA, TEMPERATURE,
    clip_low, clip_high, delta, tau_positive, tau_negative,
    LOSS, LOGP, ENTROPY, KL, CLIPPED, KL_LIMITED, WORDS, V,
    SURROGATE: tl.constexpr, BIAS_CORRECTED: tl.constexpr, PARTS: tl.constexpr,
    PADDED: tl.constexpr, PART_COLUMNS: tl.constexpr, TILE: tl.constexpr,
    PHASE: tl.constexpr, SPINS: tl.constexpr,
):  # fmt: skip
    n = tl.program_id(0).to(tl.int64) // PARTS
    part = tl.program_id(0) % PARTS
    inside = tl.arange(0, TILE)
    columns = part * PART_COLUMNS + inside
    mask = (inside < PART_COLUMNS) & (columns < V)
    row = X + n * x_stride
    x = tl.load(row + columns, mask=mask, other=-float("inf"))
    # What the end needs is loaded now, while the logits are on their way.
    target = tl.load(TARGET + n)
    temperature = tl.load(TEMPERATURE)
    advantage = tl.load(ADVANTAGE + n)
    weight = tl.load(WEIGHT + n)
    beta = tl.load(BETA)
    old_logp = 0.0
    if OLD is not None:
        old_logp = tl.load(OLD + n)
    ref_logp = 0.0
    if REF is not None:
        ref_logp = tl.load(REF + n)
    is_weight = 1.0
    if IS_WEIGHT is not None:
        is_weight = tl.load(IS_WEIGHT + n)

    scale = LOG2E / temperature
    has_target = (target >= 0) & (target < V)
    column = tl.where(has_target, target, 0).to(tl.int32)
    # Only the part that owns the target's column reads it, as only that part overwrites it.
    owner = part == column // PART_COLUMNS
    words = WORDS + n * (3 * PARTS + 1)
    x_target = 0.0
    if owner & (PHASE != 2):
        x_target = load_target(row, target, V)
        tl.atomic_xchg(words + 3 * PARTS, word(x_target), sem="relaxed")
    if PHASE != 2:
        x32 = x.to(tl.float32)
        k = origin_of(tl.max(x32, 0), scale)
        s, u = block_sums(x32, k, scale)
        publish(words, part, k, s, u, PARTS)
    if PHASE != 1:
        k, s, u, x_target, complete = gather(words, PARTS, PADDED, SPINS)
        logp, entropy, _ = logprob_entropy(x_target, k, s, u, scale)
        if OLD is None:
            old_logp = logp
        loss, derivative, kl, clipped, kl_limited = token_loss(
            logp, advantage, weight, old_logp, ref_logp, is_weight,
            beta, clip_low, clip_high, delta, tau_positive, tau_negative,
            SURROGATE, REF is not None, BIAS_CORRECTED,
        )  # fmt: skip
        if part == 0:
            # Where a part did not come, even a weight of 0 must not hide it.
            tl.store(LOSS + n, tl.where(complete, loss, float("nan")))
            tl.store(LOGP + n, logp)
            tl.store(ENTROPY + n, entropy)
            tl.store(KL + n, kl)
            tl.store(CLIPPED + n, clipped.to(tl.uint8))
            tl.store(KL_LIMITED + n, kl_limited.to(tl.uint8))
        coefficient = derivative / temperature
        coefficient = tl.where(tl.abs(coefficient) < float("inf"), coefficient, 0.0)
        coefficient = tl.where(complete, coefficient, float("nan"))
        out = OUT + n * out_stride
        if coefficient == 0:  # s may be NaN
            tl.store(out + columns, tl.zeros((TILE,), OUT.dtype.element_ty), mask=mask)
        else:
            y = tl.fma(x.to(tl.float32), scale, -k)
            gradient = tl.exp2(y) * (-coefficient / s)
            tl.store(out + columns, gradient.to(OUT.dtype.element_ty), mask=mask)
            if owner & has_target:
                # One more store is cheaper than a comparison for each column.
                tl.debug_barrier()
                p = tl.exp2(tl.fma(x_target, scale, -k)) / s
                gradient_target = coefficient - coefficient * p
                tl.store(out + column, gradient_target.to(OUT.dtype.element_ty))


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
    tile: LossTile | None = None,
) -> None:
    """`rows.row_grpo` for logits (N, V) with unit column stride: a program per part of a row.

    `tile`: the launch setting; None: the one of this architecture.
    """
    if out is None:
        logp, entropy, _, _ = row_logprobs(logits, targets, objective.temperature)
        per_token, *rest = objective_loss_ref(logp, objective)
        for result, value in zip(results, (per_token, logp, entropy, *rest), strict=True):
            result.copy_(value)
        return
    n, v = logits.shape
    tile = tile or _default_tile(logits)
    columns, part_columns, parts = split_row(logits, tile)
    # All bits 1: no part has published yet.
    words = torch.full((n, 3 * parts + 1), -1, dtype=torch.int32, device=logits.device)
    for phase in PHASES:
        launch(
            _grpo_kernel,
            (n * parts,),
            logits.device,
            logits, logits.stride(0), out, out.stride(0), targets,
            objective.advantages, objective.token_weights,
            objective.old_logp, objective.ref_logp, objective.is_weights,
            objective.beta, objective.temperature,
            objective.clip_low, objective.clip_high, objective.delta,
            objective.tau_positive, objective.tau_negative,
            results.loss, results.logp, results.entropy, results.kl,
            results.clipped.view(torch.uint8), results.kl_limited.view(torch.uint8),
            words, v,
            SURROGATE=objective.surrogate, BIAS_CORRECTED=objective.bias_corrected_kl,
            PARTS=parts, PADDED=triton.next_power_of_2(parts), PART_COLUMNS=part_columns,
            TILE=columns, PHASE=phase, SPINS=SPIN_LIMIT,
            num_warps=tile.warps, **_register_limit(tile.registers),
        )  # fmt: skip


def split_row(logits: torch.Tensor, tile: LossTile) -> tuple[int, int, int]:
    """Return a program's columns, a power of 2; how many of them it uses; and the parts of a row.

    Parts are balanced, and begin at multiples of 64 columns, so that accesses are wide.
    """
    v = logits.shape[1]
    columns = min(tile.columns * 2 // logits.element_size(), triton.next_power_of_2(v))
    parts = triton.cdiv(v, columns)
    step = min(64, columns)
    part_columns = triton.cdiv(triton.cdiv(v, parts), step) * step
    return columns, part_columns, triton.cdiv(v, part_columns)


def scale_(gradient: torch.Tensor, factor: torch.Tensor) -> None:
    """`rows.scale_` of a contiguous tensor; programs end at once where the factor is 1."""
    size = gradient.numel()
    programs = min(triton.cdiv(size, SCALE_BLOCK), 2048)
    options = dict(BLOCK=SCALE_BLOCK, num_warps=8)
    launch(_scale_kernel, (programs,), gradient.device, gradient, factor, size, **options)


def _default_tile(logits: torch.Tensor) -> LossTile:
    if INTERPRETED:
        return LossTile(interpreted_block(logits) * logits.element_size() // 2, 4, 0)
    return tuned("grpo", logits.device, LOSS_VARIANTS[0])


def _register_limit(registers: int) -> dict[str, int]:
    """Return Triton's option for the most registers of a thread, which AMD's compiler lacks."""
    if not registers or INTERPRETED or driver.active.get_current_target().backend != "cuda":
        return {}
    return {"maxnreg": registers}
