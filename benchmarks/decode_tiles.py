"""Which settings of decode's kernels are tried, and for which numbers of rows."""

from itertools import product

from mr1_fast.kernels.decode.linear_tiles import VARIANTS, PartsTile, Tile
from mr1_fast.kernels.overlap import Overlap

BUCKETS = (32, 64, 128)
"""Most rows of x for which a tile is chosen."""
OVERLAPS = tuple(
    Overlap(dependent, kib)
    for dependent, kib in product((False, True), (0, 4096, 16384))
    if dependent or kib
)


def tiles(operation: str, bucket: int) -> tuple[Tile | PartsTile, ...]:
    """Tiles that suit a number of rows: with fewer than a quarter, weights are read too often."""
    return tuple(t for t in VARIANTS[operation] if bucket // 4 <= t.rows <= bucket)
