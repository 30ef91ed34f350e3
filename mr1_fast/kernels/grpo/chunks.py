"""How many rows of logits the fused head makes at a time.

A chunk's GEMM for dhidden (n, D) has few output tiles, as its long side, V, is summed over. Tiles
are computed in waves of one per multiprocessor, and a wave that is not full takes as long as a full
one: 1,664 rows at D = 1,536 are 78 tiles of 128 × 256, which keep 59% of an H100 busy. So rows are
chosen by the waves of all chunks. The GEMMs for logits and dweight have thousands of tiles, where
the last wave hardly counts.

A CPU has threads in place of multiprocessors, and small tiles, which leave no thread idle for long.
What counts there is how often the head is read, and its gradient read and written: once a chunk,
whatever its rows. So the fewest chunks are best, and chunks of equal size need the least memory.

Which tile a matrix library takes is not known before a measurement: the defaults are arithmetic,
and `tuned.json` has the last word.
"""

from functools import lru_cache
from typing import NamedTuple

import torch

from ..tuned import architecture, tuned

MIB = 2**20

CHUNK_BYTES = {"cuda": 832 * MIB, "cpu": 80 * MIB}
"""Default bound on the bytes of logits that exist at a time.

At V = 151,936 it holds 2,870 rows of 16 bits, or 138 of 32 bits. A GPU rarely takes all of it.
"""

LEAST_ROWS = 1024
"""Rows of a chunk on a GPU that keep its GEMMs limited by arithmetic, not by reading the head.

n rows do n operations for each byte of a 16-bit head; an H100 can do 295 in the time of reading a
byte, other cards fewer.
"""

EQUAL_WAVES = 1.03
"""How many times the fewest waves count as equally fast, where a smaller buffer is worth more."""


class GemmTile(NamedTuple):
    """The output tile that the matrix library is taken to compute at a time, per processor."""

    rows: int
    columns: int


GEMM_VARIANTS = (
    GemmTile(128, 256),
    GemmTile(128, 128),
    GemmTile(256, 128),
    GemmTile(64, 256),
)
"""What a sweep on a GPU tries: each leads to other rows per chunk."""

SMALL_SHARED_MEMORY = ("sm_75", "sm_86", "sm_89", "sm_120")
"""GPUs with at most 100 KB of shared memory: too little for three stages of 128 × 256 × 64."""


def gemm_tile(device: torch.device) -> GemmTile:
    """Return the tile that is taken for the GEMM of dhidden on this device."""
    if device.type == "cpu":
        return GemmTile(16, 64)
    small = architecture(device) in SMALL_SHARED_MEMORY
    return tuned("linear", device, GEMM_VARIANTS[1] if small else GEMM_VARIANTS[0])


def processors(device: torch.device) -> int | None:
    """Return how many tiles a device computes at a time; None where it is not at hand."""
    if device.type == "cpu":
        return torch.get_num_threads()
    if device.type == "cuda" and torch.cuda.is_available():
        return torch.cuda.get_device_properties(device).multi_processor_count
    return None


@lru_cache
def rows_per_chunk(
    num_rows: int,
    vocabulary: int,
    itemsize: int,
    columns: int,
    chunk_bytes: int,
    num_processors: int | None,
    tile: GemmTile,
    least_memory: bool = False,
) -> int:
    """Return how many of `num_rows` rows of logits to make at a time.

    A row has `vocabulary` logits of `itemsize` bytes, and `chunk_bytes` bound those of a chunk. The
    GEMM whose waves count has `columns` columns. The rows are a multiple of the tile's where that
    is possible, at least 1 and at most `num_rows`.

    Of all choices, the fewest waves over all chunks win, then the fewest chunks, then the fewest
    rows. With `least_memory`, for a head without a gradient, to which another chunk costs nothing,
    the fewest rows from LEAST_ROWS on win whose waves are within EQUAL_WAVES of the fewest. Where
    `num_processors` is None, the rows are as many as the bytes hold, the worst case.
    """
    most = max(1, min(num_rows, chunk_bytes // (vocabulary * itemsize)))
    choices = list(range(tile.rows, most + 1, tile.rows)) or [most]
    if most == num_rows:
        choices.append(most)  # all rows at once
    if num_processors is None:
        return choices[-1]

    def waves(rows: int) -> int:
        tiles = -(-rows // tile.rows) * -(-columns // tile.columns)
        return -(-tiles // num_processors)

    def all_waves(rows: int) -> int:
        whole, rest = divmod(num_rows, rows)
        return whole * waves(rows) + waves(rest)

    if least_memory:
        choices = [rows for rows in choices if rows >= LEAST_ROWS] or choices[-1:]
        bound = EQUAL_WAVES * min(map(all_waves, choices))
        return min(rows for rows in choices if all_waves(rows) <= bound)
    return min(choices, key=lambda rows: (all_waves(rows), -(-num_rows // rows), rows))


def chunk_rows(
    device: torch.device,
    num_rows: int,
    vocabulary: int,
    width: int,
    itemsize: int,
    chunk_bytes: int,
    *,
    trains_hidden: bool,
    trains_head: bool,
    tile: GemmTile | None = None,
) -> int:
    """Return the rows per chunk on this device, of hidden states (num_rows, width).

    Without any gradient there is no dhidden: the GEMM of the logits counts.
    """
    found = processors(device)
    if tile is None:
        tile = gemm_tile(device) if found else GEMM_VARIANTS[0]
    return rows_per_chunk(
        num_rows,
        vocabulary,
        itemsize,
        width if trains_hidden or trains_head else vocabulary,
        chunk_bytes,
        found,
        tile,
        least_memory=device.type == "cuda" and not trains_head,
    )
