"""Which settings of decode's kernels are tried, and for which numbers of rows."""

from itertools import product

import torch

from mr1_fast.kernels.decode.linear_tiles import LARGE, TILES, VARIANTS, PartsTile, Tile
from mr1_fast.kernels.overlap import Overlap

BUCKETS = (32, 64, 128)
"""Most rows of x for which a tile is chosen."""
OVERLAPS = tuple(
    Overlap(dependent, kib)
    for dependent, kib in product((False, True), (0, 4096, 16384))
    if dependent or kib
)


def bucket_of(rows: int) -> int:
    """The bucket of a number of rows."""
    return min((bucket for bucket in BUCKETS if bucket >= rows), default=BUCKETS[-1])


def tiles(operation: str, bucket: int) -> tuple[Tile | PartsTile, ...]:
    """Tiles that suit a number of rows: with fewer than a quarter, weights are read too often."""
    return tuple(t for t in VARIANTS[operation] if bucket // 4 <= t.rows <= bucket)


def split_tile(rows: int, device: torch.device) -> PartsTile:
    """The tile that splits a product on this GPU where the launch table has none."""
    shared = torch.cuda.get_device_properties(device).shared_memory_per_multiprocessor
    return TILES["parts", bucket_of(rows)][0 if shared >= LARGE else 1]
