"""Rows per chunk: by hand for the cards that were reckoned with, and what holds for any input."""

import random

import pytest
import torch

from mr1_fast.kernels import tuned
from mr1_fast.kernels.grpo import chunks
from mr1_fast.kernels.grpo.chunks import (
    CHUNK_BYTES,
    GEMM_VARIANTS,
    LEAST_ROWS,
    MIB,
    GemmTile,
    chunk_rows,
    gemm_tile,
    rows_per_chunk,
)

V = 151_936
WIDE, SQUARE, CPU = GemmTile(128, 256), GemmTile(128, 128), GemmTile(16, 64)
H100, RTX_4090, RTX_3090 = (132, WIDE), (128, SQUARE), (82, SQUARE)


def on_gpu(card, columns: int, num_rows: int = 8192, least_memory: bool = False) -> int:
    """Rows per chunk of 16-bit logits under the default budget."""
    return rows_per_chunk(num_rows, V, 2, columns, CHUNK_BYTES["cuda"], *card, least_memory)


@pytest.mark.parametrize(
    "card, columns, trained, frozen",
    [
        (H100, 1536, 2816, 2816),  # 22 · 6 tiles are one wave of 132
        (H100, 4096, 2048, 1024),  # 16 · 16 and 8 · 16 tiles fill 97% of two waves and of one
        (RTX_4090, 1536, 2304, 1280),  # seven waves; 2,688 rows have as many
        (RTX_4090, 4096, 2048, 1024),  # 16 · 32 tiles are four waves of 128
        (RTX_3090, 1536, 2560, 1664),
        (RTX_3090, 4096, 2816, 1280),
    ],
)
def test_by_hand_for_8192_rows(card, columns, trained, frozen):
    assert on_gpu(card, columns) == trained
    assert on_gpu(card, columns, least_memory=True) == frozen


@pytest.mark.parametrize(
    "card, columns, rows",
    [
        (H100, 1536, 2816),
        (H100, 4096, 2048),
        (RTX_4090, 1536, 2688),
        (RTX_3090, 1536, 2560),
    ],
)
def test_whole_chunks_of_the_rows_that_fill_waves_best(card, columns, rows):
    assert on_gpu(card, columns, num_rows=9 * rows) == rows


def test_memory_of_the_logits_on_an_h100():
    assert on_gpu(H100, 1536) * V * 2 <= 850 * MIB
    assert on_gpu(H100, 4096) * V * 2 <= 650 * MIB


@pytest.mark.parametrize(
    "num_rows, itemsize, rows",
    [
        (100, 4, 100),
        (138, 4, 138),
        (139, 4, 80),  # two chunks of about equal size
        (256, 4, 128),
        (1024, 4, 128),
        (1024, 2, 256),
    ],
)
def test_a_cpu_takes_the_fewest_chunks_and_the_least_memory_for_them(num_rows, itemsize, rows):
    assert rows_per_chunk(num_rows, V, itemsize, 1536, CHUNK_BYTES["cpu"], 2, CPU) == rows


def test_what_holds_for_any_input():
    generator = random.Random(0)
    for _ in range(500):
        num_rows, vocabulary = generator.randrange(20_000), generator.randrange(1, 200_000)
        itemsize, columns = generator.choice((2, 4)), generator.randrange(1, 9000)
        budget, least = generator.randrange(1, 2**31), generator.random() < 0.5
        tile, processors = generator.choice((*GEMM_VARIANTS, CPU)), generator.randrange(1, 200)
        sizes = num_rows, vocabulary, itemsize, columns, budget
        rows = rows_per_chunk(*sizes, processors, tile, least)
        most = rows_per_chunk(*sizes, None, tile, least)
        affordable = budget // (vocabulary * itemsize)
        assert 1 <= rows <= max(1, min(num_rows, affordable)), sizes
        assert rows <= most
        if rows % tile.rows:
            assert rows == num_rows or affordable < tile.rows or num_rows == 0, sizes
        if least and most >= LEAST_ROWS + tile.rows:
            assert rows >= LEAST_ROWS, sizes

        def waves(each: int, sizes=sizes, tile=tile, processors=processors) -> int:
            parts = [min(each, sizes[0] - start) for start in range(0, sizes[0], each)]
            return sum(
                -(-(-(-part // tile.rows) * -(-sizes[3] // tile.columns)) // processors)
                for part in parts
            )

        if not least and num_rows:  # no other choice has fewer waves
            others = range(tile.rows, most + 1, tile.rows)
            assert waves(rows) == min(map(waves, (*others, most)), default=None), sizes


@pytest.mark.parametrize(
    "architecture, tile",
    [("sm_80", WIDE), ("sm_86", SQUARE), ("sm_89", SQUARE), ("sm_90", WIDE), ("gfx942", WIDE)],
)
def test_the_tile_of_a_gpu_that_was_not_measured(architecture, tile, monkeypatch):
    for module in (chunks, tuned):
        monkeypatch.setattr(module, "architecture", lambda device: architecture)
    monkeypatch.setattr(tuned, "read_table", dict)
    assert gemm_tile(torch.device("cuda")) == tile
    table = {architecture: {"linear": {"rows": 64, "columns": 256}}}
    monkeypatch.setattr(tuned, "read_table", lambda: table)
    assert gemm_tile(torch.device("cuda")) == GemmTile(64, 256)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is at hand")
def test_a_gpu_that_is_not_at_hand_is_planned_at_its_worst():
    sizes = dict(num_rows=8192, vocabulary=V, width=1536, itemsize=2, chunk_bytes=832 * MIB)
    for trains_head in (True, False):
        trains = dict(trains_hidden=True, trains_head=trains_head)
        assert chunk_rows(torch.device("cuda"), **sizes, **trains) == 2816
