"""How much of a decode step's linear layers a program computes at a time, and in how many parts.

Each choice has a name in the launch table (kernels/tuned.py), such as decode_swiglu_64: an
operation, the kind of its layers, and the most rows of x. Without an entry, plain layers take the
tiles that were the fastest on an H100, and other kinds what fits by arithmetic.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch

from ..tuned import tuned
from .layer import Layer


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


class PartsTile(NamedTuple):
    """A tile, and how many programs a product is split into over D."""

    columns: int
    rows: int
    depth: int
    warps: int
    stages: int
    programs: int
    """Programs for each multiprocessor that the parts should amount to."""


BY_PYTORCH = PartsTile(0, 0, 0, 0, 0, 0)
"""Stands for PyTorch's own product in one part."""

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
    ("parts", 32): (PartsTile(64, 32, 128, 4, 4, 2), PartsTile(64, 32, 64, 4, 4, 2)),
    ("parts", 64): (PartsTile(64, 64, 128, 4, 4, 2), PartsTile(64, 64, 64, 4, 3, 2)),
    ("parts", 128): (PartsTile(64, 64, 128, 4, 4, 2), PartsTile(64, 64, 64, 4, 3, 2)),
    ("linears_four_bit", 32): (Tile(64, 16, 128, 4, 4), Tile(64, 16, 128, 4, 4)),
    ("linears_four_bit", 64): (Tile(64, 64, 128, 4, 4), Tile(64, 64, 64, 4, 3)),
    ("linears_four_bit", 128): (Tile(64, 64, 128, 4, 4), Tile(64, 64, 64, 4, 3)),
    ("swiglu_four_bit", 32): (Tile(128, 32, 64, 4, 4), Tile(128, 32, 64, 4, 4)),
    ("swiglu_four_bit", 64): (Tile(128, 64, 64, 4, 4), Tile(128, 64, 64, 4, 3)),
    ("swiglu_four_bit", 128): (Tile(128, 64, 64, 4, 4), Tile(128, 64, 64, 4, 3)),
    ("parts_four_bit", 32): (PartsTile(128, 32, 64, 4, 4, 2), PartsTile(64, 32, 64, 4, 4, 2)),
    ("parts_four_bit", 64): (PartsTile(128, 64, 64, 4, 4, 2), PartsTile(64, 64, 64, 4, 3, 2)),
    ("parts_four_bit", 128): (PartsTile(128, 64, 64, 4, 4, 2), PartsTile(64, 64, 64, 4, 3, 2)),
}
"""Two tiles for each operation and most rows: for GPUs with LARGE shared memory, and for others.

The first of linears and swiglu in 16 bits were the best of a sweep on an H100; nothing else was
measured yet (benchmarks/sweep.py decode_linears, …). In 4 bits a tile has what needs the fewest
instructions for each number: 4 warps, since 8 would dequantise the same numbers twice, and all rows
up to 64, since other programs would dequantise them again.
"""
VARIANTS = {
    "linears": (
        Tile(64, 16, 64, 4, 4),
        Tile(64, 16, 128, 4, 4),
        Tile(64, 16, 128, 4, 5),
        Tile(64, 32, 64, 4, 4),
        Tile(64, 32, 128, 4, 4),
        Tile(64, 32, 128, 4, 5),
        Tile(64, 64, 64, 4, 3),
        Tile(64, 64, 128, 4, 3),
        Tile(128, 32, 64, 4, 4),
        Tile(128, 64, 64, 4, 3),
    ),
    "swiglu": (
        Tile(128, 32, 64, 4, 3),
        Tile(128, 32, 64, 4, 4),
        Tile(128, 32, 128, 4, 3),
        Tile(128, 64, 64, 4, 3),
        Tile(128, 64, 64, 4, 4),
        Tile(128, 64, 64, 8, 3),
        Tile(256, 32, 64, 8, 3),
        Tile(256, 64, 64, 8, 3),
    ),
    "parts": (
        PartsTile(64, 32, 64, 4, 4, 2),
        PartsTile(64, 32, 128, 4, 4, 2),
        PartsTile(64, 64, 64, 4, 3, 2),
        PartsTile(64, 64, 64, 4, 4, 3),
        PartsTile(64, 64, 128, 4, 3, 2),
        PartsTile(64, 64, 128, 4, 4, 1),
        PartsTile(64, 64, 128, 4, 4, 2),
        PartsTile(128, 32, 64, 4, 4, 2),
        PartsTile(128, 64, 64, 4, 3, 2),
        PartsTile(128, 64, 64, 4, 4, 1),
        PartsTile(128, 64, 64, 4, 4, 2),
    ),
}
"""Settings of an operation that a sweep may try, for any kind of layers and number of rows."""
MOST_OF_A = 4096
"""Elements of A that a program multiplies at a time: of more, registers spill on an A100."""
RESERVED = 2 * 2**10
"""Bytes of shared memory that a program does not get, or needs for other things."""
LEAST_STEPS = 2
"""Tiles of D that a part of a product has at least."""


def choose_tile(
    operation: str,
    x: torch.Tensor,
    layers: Sequence[Layer],
    tile: Tile | PartsTile | None = None,
) -> Tile | PartsTile:
    """Choose the tile of an operation, for rows x (R, D), the kind of layers, and the GPU.

    It is BY_PYTORCH for parts of a plain layer, unless the launch table knows better. A given tile
    is only fitted to the layers' adapters.
    """
    kind = "_four_bit" if layers[0].in_four_bits else ""
    default = default_tile(operation + kind, len(x), x.device)
    if any(layer.adapter is not None for layer in layers):
        kind += "_lora"
    if operation == "parts" and not kind:
        default = BY_PYTORCH
    if tile is None:
        tile = tuned(f"decode_{operation}{kind}_{bucket_of(len(x))}", x.device, default)
    return _fitted(tile, operation, layers, _shared_memory(x.device))


def default_tile(name: str, rows: int, device: torch.device) -> Tile | PartsTile:
    """Return the tile of TILES for an operation, R rows and a GPU."""
    large, small = TILES[name, bucket_of(rows)]
    return large if _shared_memory(device) >= LARGE else small


def bucket_of(rows: int) -> int:
    """Return the most rows that have the tile of so many: one of 32, 64 and 128."""
    return min(max(1 << (rows - 1).bit_length(), 32), 128)


def splits_of(tile: PartsTile, rows: int, shape: tuple[int, int], device: torch.device) -> int:
    """Choose in how many parts a layer of shape (N, D) is computed, for R rows; each has a part."""
    n, d = shape
    steps = -(-d // tile.depth)
    tiles = -(-rows // tile.rows) * -(-n // tile.columns)
    most = tile.programs * _multiprocessors(device) // tiles
    splits = max(1, min(most, steps // LEAST_STEPS))
    return -(-steps // -(-steps // splits))


def tile_rank(layers: Sequence[Layer]) -> int:
    """Return the rows of A in a tile: a power of two from 16 on, or 0 without adapters."""
    ranks = [len(layer.adapter.a) for layer in layers if layer.adapter is not None]
    return max(16, 1 << (max(ranks) - 1).bit_length()) if ranks else 0


def _fitted(
    tile: Tile | PartsTile, operation: str, layers: Sequence[Layer], shared: int
) -> Tile | PartsTile:
    """Take less depth, fewer stages or fewer rows, until tiles of A fit beside those of W and x."""
    a_rows = _a_rows(operation, layers)
    least_depth = 64 if layers[0].in_four_bits else 32  # 4 bits: a block; 16 bits: half a line
    while tile.depth > least_depth and a_rows * tile.depth > MOST_OF_A:
        tile = tile._replace(depth=tile.depth // 2)
    while tile.stages > 2 and _shared_bytes(tile, a_rows, layers) > shared - RESERVED:
        tile = tile._replace(stages=tile.stages - 1)
    if a_rows >= 32 and layers[0].in_four_bits:  # dequantisation needs registers, too
        tile = tile._replace(rows=min(tile.rows, 32 if a_rows < 128 else 16))
    return tile


def _a_rows(operation: str, layers: Sequence[Layer]) -> int:
    """Return the rows of A that a program multiplies: those of gate and of up."""
    return tile_rank(layers) * (2 if operation == "swiglu" else 1)


def _shared_bytes(tile: Tile | PartsTile, a_rows: int, layers: Sequence[Layer]) -> int:
    """Bound the shared memory of a program; A is rounded in registers, and needs a stage less."""
    w = tile.columns // 2 if layers[0].in_four_bits else 2 * tile.columns
    sizes = [layer.adapter.a.element_size() for layer in layers if layer.adapter is not None]
    a = a_rows * max(sizes, default=0)
    return tile.depth * (tile.stages * (w + 2 * tile.rows) + (tile.stages - 1) * a)


@lru_cache
def _shared_memory(device: torch.device) -> int:
    """Look up the bytes of shared memory of a GPU's multiprocessor; elsewhere as on small GPUs."""
    if device.type != "cuda":
        return 100 * 2**10
    return torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor


@lru_cache
def _multiprocessors(device: torch.device) -> int:
    """Look up a GPU's multiprocessors; 12 for other devices, for tests."""
    if device.type != "cuda":
        return 12
    return torch.cuda.get_device_properties(device).multi_processor_count
