"""The operations of decode_linear.py in Triton: one kernel for both, its tiles, launchers.

A program takes some columns of the output and multiplies their rows of the weights, streamed once, with all rows of x.
Products are transposed: weights are the long side of the tensor cores' tiles, which is 64 on Hopper, and rows of x the
short one. Gate and up are one product: half of a tile's rows are gate's, the other half the same ones of up.

The norm before them is a launch of its own: computed in this loop, from residual, update and norm, it took longer than
that launch (benchmarks/RESULTS.md).

Nothing is read on the host: a CUDA graph can hold the launches, after a first one outside.
"""

from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from .operations_triton import _dot, _launch


class Tile(NamedTuple):
    """What a program takes at a time, and how."""

    columns: int
    """Rows of weights; of gate and up together."""
    rows: int
    """Rows of x at most; others are other programs', which read the weights again from L2."""
    depth: int
    """Elements of D."""
    warps: int
    stages: int


LARGE = 160 * 2**10
"""GPUs with so many bytes of shared memory take the first tiles below: A100, H100. RTX 3090, 4090, 5090 have 100 KB."""
TILES = {
    ("linears", 32): (Tile(64, 16, 128, 4, 5), Tile(64, 16, 64, 4, 4)),
    ("linears", 64): (Tile(64, 16, 128, 4, 5), Tile(64, 32, 64, 4, 4)),
    ("linears", 128): (Tile(64, 32, 128, 4, 5), Tile(64, 64, 64, 4, 3)),
    ("swiglu", 32): (Tile(128, 32, 64, 4, 4), Tile(128, 32, 64, 4, 3)),
    ("swiglu", 64): (Tile(128, 64, 64, 4, 4), Tile(128, 64, 64, 8, 3)),
    ("swiglu", 128): (Tile(128, 64, 64, 4, 3), Tile(128, 64, 64, 8, 3)),
}
"""For an operation and up to so many rows; the first ones are the best of benchmarks/bench_decode_step.py --sweep on an
H100, the others fit where nothing was measured yet."""

# --- kernel -------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["R"])
def _linears_kernel(X, x_stride, W0, W1, W2, B0, B1, B2, N0, N1, N2, OUT, R, D, SWIGLU: tl.constexpr,
                    ALIGNED: tl.constexpr, COLUMNS: tl.constexpr, ROWS: tl.constexpr, DEPTH: tl.constexpr):  # fmt: skip
    tile = tl.program_id(1)
    row = tl.program_id(0) * ROWS + tl.arange(
        0, ROWS
    )  # neighbours read the same weights: L2 has them
    index = tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    dtype = X.dtype.element_ty

    # Rows of the weights, the last one again where there are no more
    if SWIGLU:
        WIDTH: tl.constexpr = COLUMNS // 2
        column = tile * WIDTH + index % WIDTH
        start = tl.minimum(column, N0 - 1).to(tl.int64) * D
        w_rows = tl.where(index < WIDTH, W0 + start, W1 + start)
    else:
        WIDTH: tl.constexpr = COLUMNS
        column = tile * WIDTH + index
        w_rows = W0 + tl.minimum(column, N0 - 1).to(tl.int64) * D
        if W1 is not None:
            w_rows = tl.where(
                column < N0, w_rows, W1 + tl.minimum(column - N0, N1 - 1).to(tl.int64) * D
            )
        if W2 is not None:
            w_rows = tl.where(
                column < N0 + N1, w_rows, W2 + tl.minimum(column - N0 - N1, N2 - 1).to(tl.int64) * D
            )
    if ALIGNED:  # it does not see that through the choice
        w_rows = tl.multiple_of(w_rows, 16)
    w_at = w_rows[:, None] + depth[None, :]
    x_at = X + tl.minimum(row, R - 1)[:, None] * x_stride + depth[None, :]

    product = tl.zeros((COLUMNS, ROWS), tl.float32)
    for k in tl.range(0, D, DEPTH):
        inside = ((k + depth < D) | ALIGNED)[None, :]
        w = tl.load(w_at + k, mask=inside, other=0.0, eviction_policy="evict_first")
        x = tl.load(x_at + k, mask=inside, other=0.0)
        product = _dot(w, tl.trans(x), product)

    if SWIGLU:
        gate, up = tl.split(tl.permute(tl.reshape(product, (2, WIDTH, ROWS)), (1, 2, 0)))
        out = gate * tl.sigmoid(gate) * up
        column = tile * WIDTH + tl.arange(0, WIDTH)
        n = N0
    else:
        n = N0 + N1 + N2
        bias = tl.zeros((WIDTH,), tl.float32)
        if B0 is not None:
            bias += tl.load(B0 + column, mask=column < N0, other=0.0).to(tl.float32)
        if B1 is not None:
            inside = (column >= N0) & (column < N0 + N1)
            bias += tl.load(B1 + column - N0, mask=inside, other=0.0).to(tl.float32)
        if B2 is not None:
            inside = (column >= N0 + N1) & (column < n)
            bias += tl.load(B2 + column - N0 - N1, mask=inside, other=0.0).to(tl.float32)
        out = product + bias[:, None]
    at = OUT + row[None, :].to(tl.int64) * n + column[:, None]
    tl.store(at, out.to(dtype), mask=(column < n)[:, None] & (row < R)[None, :])


# --- launchers ----------------------------------------------------------------------------------------------------


def linears(x, weights, biases, tile: Tile | None = None) -> tuple[torch.Tensor, ...]:
    """`decode_linear.linears`: programs take columns of the outputs beside one another."""
    if not 1 <= len(weights) == len(biases) <= 3:
        raise ValueError(
            f"{len(weights)} weights and {len(biases)} biases: 1 to 3, and as many, expected"
        )
    widths = [len(weight) for weight in weights]
    tile = tile or choose_tile("linears", x)
    return _run(x, weights, biases, sum(widths), tile.columns, tile).split(widths, dim=1)


def swiglu(x, gate, up, tile: Tile | None = None) -> torch.Tensor:
    """`decode_linear.swiglu`: programs take columns of gate and up."""
    if gate.shape != up.shape:
        raise ValueError(
            f"gate of shape {tuple(gate.shape)}, up of {tuple(up.shape)}: alike expected"
        )
    tile = tile or choose_tile("swiglu", x)
    return _run(x, (gate, up), (), len(gate), tile.columns // 2, tile)


def choose_tile(operation: str, x: torch.Tensor) -> Tile:
    """Of TILES, for rows x (R, D) and the GPU they are on."""
    bucket = min(max(triton.next_power_of_2(len(x)), 32), 128)
    large, small = TILES[operation, bucket]
    return large if _shared_memory(x.device) >= LARGE else small


@lru_cache
def _shared_memory(device: torch.device) -> int:
    """Bytes a multiprocessor has for programs; of what is not a GPU, none."""
    return (
        torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
        if device.type == "cuda"
        else 0
    )


def _run(x, weights, biases, n: int, width: int, tile: Tile) -> torch.Tensor:
    """n columns of output, of which a program takes `width`."""
    rows, d = x.shape
    for weight in weights:
        if weight.shape[1] != d or not weight.is_contiguous():
            raise ValueError(
                f"weight of shape {tuple(weight.shape)}, strides {weight.stride()}: dense (N, {d}) expected"
            )
    out, missing = x.new_empty(rows, n), (None,) * 3
    _launch(_linears_kernel, (triton.cdiv(rows, tile.rows), triton.cdiv(n, width)), x,
        x, x.stride(0), *(*weights, *missing)[:3], *(*biases, *missing)[:3], *(*map(len, weights), 0, 0)[:3], out,
        rows, d, SWIGLU=width < tile.columns,
        ALIGNED=d % tile.depth == 0 and all(w.data_ptr() % 16 == 0 for w in weights),
        COLUMNS=tile.columns, ROWS=tile.rows, DEPTH=tile.depth, num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out
