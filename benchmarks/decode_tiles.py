"""The settings of decode's kernels that sweep_decode.py tries; what a GPU cannot hold drops out."""

from itertools import product

from mr1_fast.kernels.decode.linear_tiles import PartsTile, Tile
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


def linears_tiles(kind: str, bucket: int) -> list[Tile]:
    """Tiles of linears: of weights in 4 bits, each program should take all rows."""
    if "_four_bit" in kind:
        return [
            Tile(64, bucket, 64, 4, 4),
            Tile(64, bucket, 128, 4, 3),
            Tile(64, bucket, 128, 8, 3),
            Tile(128, bucket, 64, 8, 3),
            Tile(64, bucket, 256, 8, 3),
        ]
    fewer = max(16, bucket // 4)
    return [
        Tile(64, fewer, 128, 4, 5),
        Tile(64, bucket // 2, 128, 4, 4),
        Tile(64, bucket // 2, 64, 4, 4),
        Tile(64, bucket, 64, 4, 3),
        Tile(64, bucket, 128, 4, 3),
    ]


def swiglu_tiles(kind: str, bucket: int) -> list[Tile]:
    """Tiles of swiglu, half of whose columns are gate's."""
    if "_four_bit" in kind:
        return [
            Tile(128, bucket, 64, 4, 3),
            Tile(128, bucket, 64, 8, 4),
            Tile(128, bucket, 128, 8, 3),
            Tile(64, bucket, 128, 4, 3),
        ]
    return [
        Tile(128, min(bucket, 64), 64, 4, 4),
        Tile(128, min(bucket, 64), 64, 8, 3),
        Tile(128, max(32, bucket // 2), 64, 4, 3),
        Tile(128, bucket, 64, 8, 4),
        Tile(128, bucket, 128, 8, 3),
    ]


def parts_tiles(kind: str, bucket: int) -> list[PartsTile]:
    """Tiles of linear_parts, and how many programs a multiprocessor gets."""
    rows = min(bucket, 64)
    if "_four_bit" in kind:
        return [
            PartsTile(64, bucket, 128, 4, 3, programs) for programs in (1, 2, 4)
        ] + [PartsTile(64, bucket, 64, 4, 4, 2), PartsTile(64, bucket, 128, 8, 3, 2)]  # fmt: skip
    return [
        PartsTile(64, rows, 128, 4, 4, 2),
        PartsTile(64, rows, 128, 4, 4, 1),
        PartsTile(64, rows, 128, 4, 3, 3),
        PartsTile(64, rows, 64, 4, 4, 2),
        PartsTile(64, rows, 64, 4, 4, 4),
        PartsTile(64, max(32, rows // 2), 128, 4, 4, 3),
    ]
