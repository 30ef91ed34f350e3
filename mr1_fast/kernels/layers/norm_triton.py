"""The norms of a layer in Triton, forward and backward: a program holds whole rows in registers.

Forward, each row is a program: it reads x and the update, and writes the residual and the normed
row. Backward, a fixed number of programs go through the rows in order, the next rows being loaded
while one is worked on; each adds up its own part of dweight and dbias in registers, and writes it
once at its end. Nothing is added by atomics, so the same rows give the same bits.

Forward moves x and the update in, the residual and the normed row out. Backward moves dnormed,
dresidual and x in, dx and the normed row out, and 4 or 8 bytes per column and program. The weights
stay in registers.

Only D, the dtype, and which inputs exist select a kernel; the number of rows does not.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..launch import launch
from ..overlap import NO_OVERLAP, Overlap, overlap_options
from ..overlap_triton import let_next_begin, prefetch, wait_for_previous
from .strides import require_adjacent

BYTES_PER_WARP = 1024
"""Bytes of a row that a warp holds: 32 a thread, and 16 on AMD, so that accesses have 128 bits."""
SUM_COLUMNS, SUM_PARTS = 64, 64
"""Columns of a program that adds up the parts of dweight and dbias, and the parts that it loads at
a time: 128 bytes a thread."""
STAGES = 2
"""Rows in flight in a program of the backward: the one that is worked on, and the next."""

# --- device functions ---------------------------------------------------------------------------


@triton.jit
def _load(ROWS, row, stride, columns, mask):
    """Load one row, with 0 beyond its end."""
    return tl.load(ROWS + row * stride + columns, mask=mask, other=0.0)


@triton.jit
def _centre(x, mask, eps, D, LAYER: tl.constexpr):
    """Return the row, less its mean for LayerNorm, and 1/√(mean square + ε) of that."""
    if LAYER:
        x = tl.where(mask, x - tl.sum(x, 0) / D, 0.0)
    return x, tl.rsqrt(tl.sum(x * x, 0) / D + eps)


@triton.jit
def _weigh(standard, weight, bias, dtype: tl.constexpr, LAYER: tl.constexpr):
    """Apply the weights to a standardised row; the RMS norm rounds it before."""
    if LAYER:
        return (standard * weight + bias).to(dtype)
    return (standard.to(dtype).to(tl.float32) * weight).to(dtype)


# --- kernels ------------------------------------------------------------------------------------


@triton.jit
def _norm_kernel(
    X, x_stride, UPDATE, update_stride, part_stride, WEIGHT, BIAS, RESIDUAL, NORMED, eps, D,
    UPCOMING, CHUNKS, COUNT: tl.constexpr, IN_BULK: tl.constexpr, LANES: tl.constexpr,
    PARTS: tl.constexpr, DEPENDENT: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """Add an update, which may come in parts, to one row of D columns, and norm it."""
    let_next_begin(DEPENDENT)
    prefetch(UPCOMING, CHUNKS, tl.program_id(0), tl.num_programs(0), COUNT, IN_BULK, LANES)
    wait_for_previous(DEPENDENT)
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < D
    dtype = X.dtype.element_ty
    out = row * D + columns
    x = _load(X, row, x_stride, columns, mask).to(tl.float32)
    weight = tl.load(WEIGHT + columns, mask=mask, other=0.0).to(tl.float32)
    bias = 0.0
    if BIAS is not None:
        bias = tl.load(BIAS + columns, mask=mask, other=0.0).to(tl.float32)
    if UPDATE is not None:
        update = _load(UPDATE, row, update_stride, columns, mask).to(tl.float32)
        for part in tl.static_range(1, PARTS):
            update += _load(UPDATE + part * part_stride, row, update_stride, columns, mask)
        residual = (x + update.to(dtype).to(tl.float32)).to(dtype)
        tl.store(RESIDUAL + out, residual, mask=mask)
        x = residual.to(tl.float32)
    x, r = _centre(x, mask, eps, D, BIAS is not None)
    tl.store(NORMED + out, _weigh(x * r, weight, bias, dtype, BIAS is not None), mask=mask)


@triton.jit(do_not_specialize=["rows"])
def _norm_backward_kernel(
    DNORMED, dnormed_stride, DRESIDUAL, dresidual_stride, X, x_stride, WEIGHT, BIAS,
    DX, NORMED, PARTIAL, eps, rows, D, BLOCK: tl.constexpr, STAGES: tl.constexpr,
):  # fmt: skip
    """Go through every n-th row, n being the number of programs."""
    program = tl.program_id(0)
    columns = tl.arange(0, BLOCK)
    mask = columns < D
    dtype = X.dtype.element_ty
    weight = tl.load(WEIGHT + columns, mask=mask, other=0.0).to(tl.float32)
    bias = 0.0
    if BIAS is not None:
        bias = tl.load(BIAS + columns, mask=mask, other=0.0).to(tl.float32)
    dweight = tl.zeros((BLOCK,), tl.float32)
    dbias = tl.zeros((BLOCK,), tl.float32)
    for index in tl.range(program, rows, tl.num_programs(0), num_stages=STAGES):
        row = tl.cast(index, tl.int64)
        x = _load(X, row, x_stride, columns, mask).to(tl.float32)
        dy = _load(DNORMED, row, dnormed_stride, columns, mask).to(tl.float32)
        out = row * D + columns
        x, r = _centre(x, mask, eps, D, BIAS is not None)
        standard = x * r
        g = dy * weight
        dx = g - standard * (tl.sum(g * standard, 0) / D)
        if BIAS is not None:
            dx -= tl.sum(g, 0) / D
        dx *= r
        if DRESIDUAL is not None:
            dx += _load(DRESIDUAL, row, dresidual_stride, columns, mask).to(tl.float32)
        tl.store(DX + out, dx.to(dtype), mask=mask)
        if NORMED is not None:
            normed = _weigh(standard, weight, bias, dtype, BIAS is not None)
            tl.store(NORMED + out, normed, mask=mask)
        if PARTIAL is not None:
            dweight += dy * standard
            if BIAS is not None:
                dbias += dy
    if PARTIAL is not None:
        if BIAS is None:
            tl.store(PARTIAL + program * D + columns, dweight, mask=mask)
        else:
            tl.store(PARTIAL + 2 * program * D + columns, dweight, mask=mask)
            tl.store(PARTIAL + (2 * program + 1) * D + columns, dbias, mask=mask)


@triton.jit(do_not_specialize=["parts"])
def _norm_gradients_kernel(
    PARTIAL, OUT, parts, WIDTH, PARTS: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """Add up BLOCK columns of all parts, PARTS at a time and always in the same order."""
    columns = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in tl.range(0, parts, PARTS):
        part = first + tl.arange(0, PARTS)
        mask = (part < parts)[:, None] & (columns < WIDTH)[None, :]
        at = part.to(tl.int64)[:, None] * WIDTH + columns[None, :]
        total += tl.sum(tl.load(PARTIAL + at, mask=mask, other=0.0), 0)
    tl.store(OUT + columns, total.to(OUT.dtype.element_ty), mask=columns < WIDTH)


# --- launchers ----------------------------------------------------------------------------------


def add_norm(
    x: torch.Tensor,
    update: torch.Tensor | None,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    upcoming: Sequence[torch.Tensor] = (),
    overlap: Overlap = NO_OVERLAP,
) -> tuple[torch.Tensor, torch.Tensor]:
    """`operations.add_norm`; without an update, the residual is x itself.

    For a decode step, the update may be in parts (S, T, D) in fp32, and `upcoming` are the weights
    that come next, with which `overlap` says what to do.
    """
    require_adjacent(x, update)
    rows, d = x.shape
    normed = x.new_empty(x.shape)
    residual = x if update is None else x.new_empty(x.shape)
    parts, part_stride, update_stride = 1, 0, 0
    options = _row_options(x)
    if update is not None:
        update_stride = update.stride(-2)
        if update.ndim == 3:
            parts, part_stride = len(update), update.stride(0)
    launch(
        _norm_kernel, (rows,), x.device,
        x, x.stride(0), update, update_stride, part_stride, weight, bias, residual, normed, eps, d,
        PARTS=parts, **options,
        **overlap_options(overlap, upcoming, x.device, rows, options["num_warps"]),
    )  # fmt: skip
    return residual, normed


def norm_backward(
    dnormed: torch.Tensor,
    dresidual: torch.Tensor | None,
    x: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    eps: float,
    with_normed: bool,
    with_weights: bool,
    parts: int,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """`operations.norm_backward`, with as many programs as there are `parts`."""
    require_adjacent(dnormed, dresidual, x)
    rows, d = x.shape
    sums = parts, 1 if bias is None else 2, d
    dx = x.new_empty(x.shape)
    normed = x.new_empty(x.shape if with_normed else 0)
    partial = x.new_empty(sums if with_weights else 0, dtype=torch.float32)
    launch(
        _norm_backward_kernel, (parts,), x.device,
        dnormed, dnormed.stride(0), dresidual, 0 if dresidual is None else dresidual.stride(0),
        x, x.stride(0), weight, bias,
        dx, normed if with_normed else None, partial if with_weights else None, eps, rows, d,
        STAGES=STAGES, **_row_options(x),
    )  # fmt: skip
    return dx, normed, partial


def norm_gradients(partial: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    """`operations.norm_gradients`, with a program for every SUM_COLUMNS columns."""
    parts, *shape = partial.shape
    out = weight.new_empty(shape)
    launch(
        _norm_gradients_kernel, (triton.cdiv(out.numel(), SUM_COLUMNS),), weight.device,
        partial, out, parts, out.numel(), PARTS=SUM_PARTS, BLOCK=SUM_COLUMNS,
    )  # fmt: skip
    return out


def _row_options(x: torch.Tensor) -> dict[str, int]:
    """Return the block that holds a row of x, and the warps that share it."""
    block = triton.next_power_of_2(x.shape[1])
    warps = block * x.element_size() // BYTES_PER_WARP
    return dict(BLOCK=block, num_warps=min(16, max(1, warps)))
