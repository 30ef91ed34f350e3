"""The linear layers of a decode step in Triton: one kernel for all of them, and its launchers.

A program takes some columns of one layer's output, and multiplies their rows of the weight,
streamed once, with all rows of x. Products are transposed: weights are the long side of the tensor
cores' tiles, which is 64 on Hopper, and rows of x are the short side. Of gate and up, a program
takes the same rows.

With an adapter, the same loop computes t = A·xᵀ beside the product, in every program again: A is
small and L2 holds it. B·t is added after the loop. A and B are read where training keeps them, and
rounded to the dtype of x. Weights in 4 bits are dequantised tile by tile between loading and
multiplying.

Where a product has fewer tiles than the GPU can work on at a time, D is split, and a program writes
its part of the sum; whoever reads the parts adds them up in order.

The norm before these layers is a launch of its own. Computed in this loop, from residual, update
and norm, it took longer than that launch (benchmarks/RESULTS.md).

Nothing is read on the host, so a CUDA graph can hold the launches, after a first one outside of it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl

from ..four_bit.dequantise_triton import load_four_bits
from ..launch import launch
from ..overlap import Overlap, decode_overlap
from ..overlap_triton import let_next_begin, wait_for_previous
from .dot_triton import dot
from .layer import Layer
from .linear_tiles import BY_PYTORCH, PartsTile, Tile, choose_tile, splits_of, tile_rank
from .linear_weights import Weights, require_dense, weights_of

_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))


# --- device functions ---------------------------------------------------------------------------


@triton.jit
def _layer_of(tile, LAYERS, COLUMNS: tl.constexpr, COUNT: tl.constexpr):
    """Find the layer that a tile belongs to, its first tile and its first column of the output."""
    layer = LAYERS[0]
    first, column, tiles, columns = 0, 0, 0, 0
    for i in tl.static_range(1, COUNT):
        tiles += tl.cdiv(LAYERS[i - 1].n, COLUMNS)
        columns += LAYERS[i - 1].n
        here = tile >= tiles
        first, column = tl.where(here, tiles, first), tl.where(here, columns, column)
        new = LAYERS[i]
        layer = Weights(
            tl.where(here, new.stored, layer.stored),
            tl.where(here, new.n, layer.n),
            tl.where(here, new.bias, layer.bias),
            tl.where(here, new.biases, layer.biases),
            tl.where(here, new.a, layer.a),
            tl.where(here, new.b, layer.b),
            tl.where(here, new.rank, layer.rank),
            tl.where(here, new.scale, layer.scale),
            tl.where(here, new.code, layer.code),
            tl.where(here, new.absmax, layer.absmax),
            tl.where(here, new.absmax_code, layer.absmax_code),
            tl.where(here, new.absmax_scale, layer.absmax_scale),
            tl.where(here, new.absmax_offset, layer.absmax_offset),
        )
    return layer, first, column


@triton.jit
def _prefetch(LAYER, row, begin, columns, D, BLOCK: tl.constexpr):
    """Load columns of some rows of a layer's weight into L2, without waiting (from sm_90 on).

    Rows must begin at multiples of 16 bytes.
    """
    if not _INTERPRETED:
        if BLOCK:  # a byte has two numbers
            D, begin, columns = D // 2, begin // 2, columns // 2
        SIZE: tl.constexpr = LAYER.stored.dtype.element_ty.primitive_bitwidth // 8
        tl.inline_asm_elementwise(
            "cp.async.bulk.prefetch.L2.global [$1], $2; mov.u32 $0, 0;",
            "=r,l,r",
            [LAYER.stored + row.to(tl.int64) * D + begin, columns * SIZE],
            dtype=tl.int32,
            is_pure=False,
            pack=1,
        )


@triton.jit
def _rows_at(FIRST, SECOND, row, D, depth, ALIGNED: tl.constexpr):
    """Point to columns `depth` of some rows of a matrix (N, D), or half the rows of each of two."""
    start = row.to(tl.int64) * D
    rows = FIRST + start
    if SECOND is not None:
        is_first = tl.arange(0, row.shape[0]) < row.shape[0] // 2
        rows = tl.where(is_first, rows, SECOND + start)
    if ALIGNED:  # the compiler does not see it through the choice of a layer
        rows = tl.multiple_of(rows, 16)
    return rows[:, None] + depth[None, :]


@triton.jit
def _load_four_bits(LAYER, row, k, D, DEPTH: tl.constexpr, BLOCK: tl.constexpr,
                    ABSMAX_BLOCK: tl.constexpr, NESTED: tl.constexpr,
                    dtype: tl.constexpr):  # fmt: skip
    """Load columns k … k + DEPTH of some rows of a layer's weight in 4 bits."""
    return load_four_bits(
        LAYER.stored, LAYER.code, LAYER.absmax,
        LAYER.absmax_code, LAYER.absmax_scale, LAYER.absmax_offset,
        row, k, D, DEPTH, BLOCK, ABSMAX_BLOCK, NESTED, dtype,
    )  # fmt: skip


@triton.jit
def _halves(x):
    """Take the two halves of rows apart."""
    x = tl.reshape(x, (2, x.shape[0] // 2, x.shape[1]))
    return tl.split(tl.permute(x, (1, 2, 0)))


@triton.jit
def _add_b_and_bias(LAYER, column, row, t, product, with_bias, RANK: tl.constexpr,
                    BIASED: tl.constexpr, dtype: tl.constexpr):  # fmt: skip
    """Add B·(scale · t) and the bias; scale · t is rounded as in training, in each part of D."""
    if RANK:
        index = tl.arange(0, RANK)
        at = LAYER.b + row.to(tl.int64)[:, None] * LAYER.rank + index[None, :]
        b = tl.load(at, mask=(index < LAYER.rank)[None, :], other=0.0)
        product = dot(b.to(dtype), (t * LAYER.scale).to(dtype), product)
    if BIASED:
        mask = (column < LAYER.biases) & with_bias
        product += tl.load(LAYER.bias + column, mask=mask, other=0.0).to(tl.float32)[:, None]
    return product


# --- kernel -------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["R"])
def _linears_kernel(
    X, x_stride, LAYERS, OUT, R, D, N, COUNT: tl.constexpr, SWIGLU: tl.constexpr,
    PARTS: tl.constexpr, BIASED: tl.constexpr, RANK: tl.constexpr, BLOCK: tl.constexpr,
    ABSMAX_BLOCK: tl.constexpr, NESTED: tl.constexpr,
    ALIGNED: tl.constexpr, DEPENDENT: tl.constexpr, PREFETCH: tl.constexpr,
    COLUMNS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr,
):  # fmt: skip
    """Multiply ROWS rows of x with COLUMNS rows of a weight, or with half as many of two.

    PARTS: whether this is a part of a product over D, in fp32; the first one has the bias.
    RANK: rows of A in a tile, 0 without adapters.
    BLOCK: numbers that have one scale, 0 with weights in 16 bits.
    PREFETCH: columns of the weight that are prefetched while other kernels still run.
    """
    let_next_begin(DEPENDENT)
    # Programs of neighbouring rows read the same weights, which L2 holds
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    dtype = X.dtype.element_ty
    depth = tl.arange(0, DEPTH)
    if SWIGLU:
        WIDTH: tl.constexpr = COLUMNS // 2
        layer, up, first, start = LAYERS[0], LAYERS[1], 0, 0
        up_stored, up_a = up.stored, up.a
    else:
        WIDTH: tl.constexpr = COLUMNS
        up_stored, up_a = None, None
        layer, first, start = _layer_of(tl.program_id(1), LAYERS, COLUMNS, COUNT)
    column = (tl.program_id(1) - first) * WIDTH + tl.arange(0, WIDTH)
    w_row = tl.minimum(column, layer.n - 1)  # where there are no more, the last row again

    begin, end = 0, D
    if PARTS:
        length = tl.cdiv(tl.cdiv(D, DEPTH), tl.num_programs(2)) * DEPTH
        begin = tl.program_id(2) * length
        end = tl.minimum(begin + length, D)
    if PREFETCH:  # noqa: SIM102 (known to the compiler)
        if tl.program_id(0) == 0:  # programs of other rows have the same weights
            columns = tl.minimum(end - begin, PREFETCH)
            _prefetch(layer, w_row, begin, columns, D, BLOCK)
            if SWIGLU:
                _prefetch(up, w_row, begin, columns, D, BLOCK)
    wait_for_previous(DEPENDENT)

    x_at = X + tl.minimum(row, R - 1)[:, None] * x_stride + depth[None, :]
    if BLOCK:
        product = tl.zeros((WIDTH, ROWS), tl.float32)
        up_product = tl.zeros((WIDTH, ROWS), tl.float32)
    else:  # of gate and up, one product
        stored_row = (tl.program_id(1) - first) * WIDTH + tl.arange(0, COLUMNS) % WIDTH
        stored_row = tl.minimum(stored_row, layer.n - 1)
        w_at = _rows_at(layer.stored, up_stored, stored_row, D, depth, ALIGNED)
        product = tl.zeros((COLUMNS, ROWS), tl.float32)
    if RANK:
        A_ROWS: tl.constexpr = 2 * RANK if SWIGLU else RANK
        a_row = tl.arange(0, A_ROWS)
        in_a = a_row < layer.rank
        if SWIGLU:
            in_a |= (a_row >= RANK) & (a_row < RANK + up.rank)
        a_at = _rows_at(layer.a, up_a, a_row % RANK, D, depth, ALIGNED)
        t = tl.zeros((A_ROWS, ROWS), tl.float32)
    else:
        t = product
    for k in tl.range(begin, end, DEPTH):
        inside = ((k + depth < D) | ALIGNED)[None, :]
        x = tl.trans(tl.load(x_at + k, mask=inside, other=0.0))
        if BLOCK:
            w = _load_four_bits(layer, w_row, k, D, DEPTH, BLOCK, ABSMAX_BLOCK, NESTED, dtype)
            product = dot(w, x, product)
            if SWIGLU:
                w = _load_four_bits(up, w_row, k, D, DEPTH, BLOCK, ABSMAX_BLOCK, NESTED, dtype)
                up_product = dot(w, x, up_product)
        else:
            w = tl.load(w_at + k, mask=inside, other=0.0, eviction_policy="evict_first")
            product = dot(w, x, product)
        if RANK:
            a = tl.load(a_at + k, mask=in_a[:, None] & inside, other=0.0)
            t = dot(a.to(dtype), x, t)

    if SWIGLU:
        if not BLOCK:
            product, up_product = _halves(product)
        t, up_t = _halves(t)
        up_product = _add_b_and_bias(up, column, w_row, up_t, up_product, True, RANK, BIASED, dtype)
    product = _add_b_and_bias(layer, column, w_row, t, product, begin == 0, RANK, BIASED, dtype)
    if SWIGLU:
        product = product * tl.sigmoid(product) * up_product
    at = OUT + row[None, :].to(tl.int64) * N + (start + column)[:, None]
    if PARTS:
        at += tl.program_id(2).to(tl.int64) * R * N
    mask = (column < layer.n)[:, None] & (row < R)[None, :]
    tl.store(at, product.to(OUT.dtype.element_ty), mask=mask)


# --- launchers ----------------------------------------------------------------------------------


def linears(
    x: torch.Tensor,
    layers: Sequence[Layer],
    tile: Tile | None = None,
    overlap: Overlap | None = None,
) -> tuple[torch.Tensor, ...]:
    """`linear.linears`: the outputs lie beside one another.

    Raises ValueError unless there are 1 to 3 layers.
    """
    if not 1 <= len(layers) <= 3:
        raise ValueError(f"there are {len(layers)} layers, but 1 to 3 are needed")
    widths = [layer.shape[0] for layer in layers]
    out = x.new_empty(len(x), sum(widths))
    _run("linears", x, layers, out, choose_tile("linears", x, layers, tile), overlap)
    return out.split(widths, dim=1)


def swiglu(
    x: torch.Tensor,
    gate: Layer,
    up: Layer,
    tile: Tile | None = None,
    overlap: Overlap | None = None,
) -> torch.Tensor:
    """`linear.swiglu`: programs take the same columns of gate and up.

    Raises ValueError unless gate and up have the same shape.
    """
    if gate.shape != up.shape:
        raise ValueError(f"gate has shape {gate.shape} and up {up.shape}, but both need the same")
    layers = gate, up
    out = x.new_empty(len(x), gate.shape[0])
    _run("swiglu", x, layers, out, choose_tile("swiglu", x, layers, tile), overlap)
    return out


def linear_parts(
    x: torch.Tensor,
    layer: Layer,
    tile: PartsTile | None = None,
    overlap: Overlap | None = None,
) -> torch.Tensor:
    """`linear.linear_parts`: each part is a program's own."""
    tile = choose_tile("parts", x, (layer,), tile)
    if tile == BY_PYTORCH:
        return torch.nn.functional.linear(x, layer.weight, layer.bias)
    splits, n = splits_of(tile, len(x), layer.shape, x.device), layer.shape[0]
    if splits == 1:
        out = x.new_empty(len(x), n)
    else:
        out = x.new_empty(splits, len(x), n, dtype=torch.float32)
    _run("parts", x, (layer,), out, tile, overlap)
    return out


def _run(
    operation: str,
    x: torch.Tensor,
    layers: Sequence[Layer],
    out: torch.Tensor,
    tile: Tile | PartsTile,
    overlap: Overlap | None,
) -> None:
    """Compute an operation into out, (R, N) or parts of it (S, R, N)."""
    require_dense(x, layers)
    (rows, d), n = x.shape, out.shape[-1]
    is_parted = out.ndim == 3
    is_gated = operation == "swiglu"
    width = tile.columns // 2 if is_gated else tile.columns
    tiles = [triton.cdiv(layer.shape[0], width) for layer in layers]
    weights = weights_of(layers)
    four_bit = layers[0].weight if layers[0].in_four_bits else None
    pointers = [layer.stored for layer in layers]
    pointers += [layer.adapter.a for layer in layers if layer.adapter is not None]
    aligned = d % tile.depth == 0 and all(p.data_ptr() % 16 == 0 for p in pointers)
    overlap = overlap or decode_overlap(x.device)
    launch(
        _linears_kernel,
        (triton.cdiv(rows, tile.rows), tiles[0] if is_gated else sum(tiles),
         len(out) if is_parted else 1),
        x.device,
        x, x.stride(0), weights, out, rows, d, n, COUNT=len(layers), SWIGLU=is_gated,
        PARTS=is_parted, BIASED=any(layer.bias is not None for layer in layers),
        RANK=tile_rank(layers),
        BLOCK=four_bit.block if four_bit else 0,
        ABSMAX_BLOCK=four_bit.absmax_block if four_bit else 0,
        NESTED=four_bit is not None and four_bit.absmax_code is not None,
        ALIGNED=aligned, DEPENDENT=overlap.dependent,
        PREFETCH=tile.depth * (tile.stages - 1) if overlap.dependent and aligned else 0,
        COLUMNS=tile.columns, ROWS=tile.rows, DEPTH=tile.depth,
        num_warps=tile.warps, num_stages=tile.stages,
        **(dict(launch_pdl=True) if overlap.dependent else {}),
    )  # fmt: skip
