"""The linear layers of a decode step in Triton: one kernel for both, its tiles, launchers.

A program takes some columns of the output, and multiplies their rows of the weights, streamed once,
with all rows of x. Products are transposed: weights are the long side of the tensor cores' tiles,
which is 64 on Hopper, and rows of x are the short side. Gate and up are one product: half of a
tile's rows are gate's, the other half are the same rows of up.

The norm before these layers is a launch of its own. Computed in this loop, from residual, update
and norm, it took longer than that launch (benchmarks/RESULTS.md).

Nothing is read on the host, so a CUDA graph can hold the launches, after a first one outside of it.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..launch import launch
from .dot_triton import dot


class Tile(NamedTuple):
    """How much of a product a program computes at a time, and how."""

    columns: int
    """Rows of weights: those of gate and of up count together."""
    rows: int
    """Most rows of x; further rows are other programs', which read the weights again from L2."""
    depth: int
    """Elements of D that are multiplied at a time."""
    warps: int
    """Warps of the program."""
    stages: int
    """Tiles of weights and x in shared memory, the one being multiplied included."""


LARGE = 160 * 2**10
"""Bytes of shared memory from which a GPU takes the first of TILES: A100 and H100 do.

RTX 3090, 4090 and 5090, with 100 KB, take the second.
"""
TILES = {
    ("linears", 32): (Tile(64, 16, 128, 4, 5), Tile(64, 16, 64, 4, 4)),
    ("linears", 64): (Tile(64, 16, 128, 4, 5), Tile(64, 32, 64, 4, 4)),
    ("linears", 128): (Tile(64, 32, 128, 4, 5), Tile(64, 64, 64, 4, 3)),
    ("swiglu", 32): (Tile(128, 32, 64, 4, 4), Tile(128, 32, 64, 4, 3)),
    ("swiglu", 64): (Tile(128, 64, 64, 4, 4), Tile(128, 64, 64, 8, 3)),
    ("swiglu", 128): (Tile(128, 64, 64, 4, 3), Tile(128, 64, 64, 8, 3)),
}
"""Two tiles for each operation and most rows: for GPUs with LARGE shared memory, and for others.

The first are the best of benchmarks/bench_decode_step.py --sweep on an H100; the second fit smaller
GPUs, on which nothing was measured yet.
"""

# --- kernel -------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["R"])
def _linears_kernel(X, x_stride, W0, W1, W2, B0, B1, B2, N0, N1, N2, OUT, R, D,
                    SWIGLU: tl.constexpr, ALIGNED: tl.constexpr, COLUMNS: tl.constexpr,
                    ROWS: tl.constexpr, DEPTH: tl.constexpr):  # fmt: skip
    """Multiply ROWS rows of x with COLUMNS rows of the weights, and gate or add the bias."""
    tile = tl.program_id(1)
    # Programs of neighbouring rows read the same weights, which L2 holds
    row = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    index = tl.arange(0, COLUMNS)
    depth = tl.arange(0, DEPTH)
    dtype = X.dtype.element_ty

    # Addresses of the weights' rows; where there are no more, the last row again
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
            before = column < N0
            w1_rows = W1 + tl.minimum(column - N0, N1 - 1).to(tl.int64) * D
            w_rows = tl.where(before, w_rows, w1_rows)
        if W2 is not None:
            before = column < N0 + N1
            w2_rows = W2 + tl.minimum(column - N0 - N1, N2 - 1).to(tl.int64) * D
            w_rows = tl.where(before, w_rows, w2_rows)
    if ALIGNED:  # the compiler does not see it through the choice of a weight
        w_rows = tl.multiple_of(w_rows, 16)
    w_at = w_rows[:, None] + depth[None, :]
    x_at = X + tl.minimum(row, R - 1)[:, None] * x_stride + depth[None, :]

    product = tl.zeros((COLUMNS, ROWS), tl.float32)
    for k in tl.range(0, D, DEPTH):
        inside = ((k + depth < D) | ALIGNED)[None, :]
        w = tl.load(w_at + k, mask=inside, other=0.0, eviction_policy="evict_first")
        x = tl.load(x_at + k, mask=inside, other=0.0)
        product = dot(w, tl.trans(x), product)

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


# --- launchers ----------------------------------------------------------------------------------


def linears(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    tile: Tile | None = None,
) -> tuple[torch.Tensor, ...]:
    """`linear.linears`: programs take columns of the outputs, which lie beside one another.

    Raises ValueError unless there are 1 to 3 weights and as many biases.
    """
    if not 1 <= len(weights) == len(biases) <= 3:
        raise ValueError(
            f"there are {len(weights)} weights and {len(biases)} biases, but 1 to 3 weights are "
            "needed, and as many biases"
        )
    widths = [len(weight) for weight in weights]
    tile = tile or choose_tile("linears", x)
    return _run(x, weights, biases, sum(widths), tile.columns, tile).split(widths, dim=1)


def swiglu(
    x: torch.Tensor, gate: torch.Tensor, up: torch.Tensor, tile: Tile | None = None
) -> torch.Tensor:
    """`linear.swiglu`: programs take the same columns of gate and up.

    Raises ValueError unless gate and up have the same shape.
    """
    if gate.shape != up.shape:
        raise ValueError(
            f"gate has shape {tuple(gate.shape)} and up {tuple(up.shape)}, but both need the same"
        )
    tile = tile or choose_tile("swiglu", x)
    return _run(x, (gate, up), (), len(gate), tile.columns // 2, tile)


def choose_tile(operation: str, x: torch.Tensor) -> Tile:
    """Choose from TILES for rows x (R, D) and the GPU they are on."""
    bucket = min(max(triton.next_power_of_2(len(x)), 32), 128)
    large, small = TILES[operation, bucket]
    return large if _shared_memory(x.device) >= LARGE else small


@lru_cache
def _shared_memory(device: torch.device) -> int:
    """Look up the bytes of shared memory of a GPU's multiprocessor; 0 for other devices."""
    if device.type != "cuda":
        return 0
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor


def _run(
    x: torch.Tensor,
    weights: Sequence[torch.Tensor],
    biases: Sequence[torch.Tensor | None],
    n: int,
    width: int,
    tile: Tile,
) -> torch.Tensor:
    """Compute n columns of output, of which each program takes `width`."""
    rows, d = x.shape
    if x.stride(-1) != 1:
        raise ValueError(
            f"x of shape {tuple(x.shape)} has strides {x.stride()}, but its columns must be "
            "adjacent"
        )
    for weight in weights:
        if weight.shape[1] != d or not weight.is_contiguous():
            raise ValueError(
                f"a weight has shape {tuple(weight.shape)} and strides {weight.stride()}, but must "
                f"be dense and (N, {d})"
            )

    out = x.new_empty(rows, n)
    aligned = d % tile.depth == 0 and all(weight.data_ptr() % 16 == 0 for weight in weights)
    w0, w1, w2 = _three(weights, None)
    b0, b1, b2 = _three(biases, None)
    n0, n1, n2 = _three([len(weight) for weight in weights], 0)
    launch(
        _linears_kernel, (triton.cdiv(rows, tile.rows), triton.cdiv(n, width)), x.device,
        x, x.stride(0), w0, w1, w2, b0, b1, b2, n0, n1, n2, out, rows, d,
        SWIGLU=width < tile.columns, ALIGNED=aligned,
        COLUMNS=tile.columns, ROWS=tile.rows, DEPTH=tile.depth,
        num_warps=tile.warps, num_stages=tile.stages,
    )  # fmt: skip
    return out


def _three(values: Sequence, missing: object) -> list:
    """Fill up to three values with `missing`."""
    return [*values, *[missing] * (3 - len(values))]
