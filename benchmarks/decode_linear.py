"""Launches of decoding's linear layers without numbers, of every kind, which compile them."""

import itertools
from functools import partial
from unittest import mock

import torch

from mr1_fast.kernels.decode import linear_tiles, linear_triton
from mr1_fast.kernels.decode.layer import Adapter, Layer
from mr1_fast.kernels.four_bit.weight import FourBitWeight

MODELS = ((12, 2, 1536, 8960), (28, 4, 3584, 18_944))
"""Heads, key heads, hidden size and MLP size of Qwen2-VL 2B and 7B."""
DEFAULTS = {"linears": (None,), "swiglu": (None,), "parts": (None,)}
"""Tiles as linear_tiles.VARIANTS has them: here those that the launchers choose."""


def launch_linear(
    dtype: torch.dtype,
    shared: int,
    multiprocessors: int,
    kinds=((False, 0), (False, 16), (True, 0), (True, 16)),
    models=MODELS,
    rows: tuple[int, ...] = (32, 64, 128),
    variants: bool = False,
    device: str = "meta",
) -> None:
    """Launch them with the tiles for a GPU of so much shared memory, or with all VARIANTS.

    kinds: whether weights are in 4 bits, and the rank of adapters, 0 without. PyTorch computes
    plain o_proj and down_proj.
    """
    with mock.patch.multiple(
        linear_tiles,
        _shared_memory=lambda device: shared,
        _multiprocessors=lambda device: multiprocessors,
    ):
        for (in_four_bits, rank), (heads, kv_heads, hidden, mlp), r in itertools.product(
            kinds, models, rows
        ):
            make = partial(_decode_layer, dtype, device, in_four_bits, rank)
            x, up = torch.empty(r, hidden, dtype=dtype, device=device), make(mlp, hidden)
            widths = (heads * 128, kv_heads * 128, kv_heads * 128)
            projections = [make(n, hidden, with_bias=True) for n in widths]
            tiles = linear_tiles.VARIANTS if variants else DEFAULTS
            for tile in tiles["linears"]:
                linear_triton.linears(x, projections, tile)
            for tile in tiles["swiglu"]:
                linear_triton.swiglu(x, up, up, tile)
            for tile in tiles["parts"]:
                for n, d in ((hidden, heads * 128), (hidden, mlp)):
                    x = torch.empty(r, d, dtype=dtype, device=device)
                    linear_triton.linear_parts(x, make(n, d), tile)


def _decode_layer(
    dtype: torch.dtype,
    device: str,
    in_four_bits: bool,
    rank: int,
    n: int,
    d: int,
    with_bias: bool = False,
) -> Layer:
    """Make a layer (n, d) without numbers, its adapter in fp32, its scales quantised again."""

    def empty(*shape: int, dtype: torch.dtype = dtype) -> torch.Tensor:
        return torch.empty(shape, dtype=dtype, device=device)

    fp32, byte, blocks = torch.float32, torch.uint8, n * d // 64
    weight = empty(n, d)
    if in_four_bits:
        weight = FourBitWeight(
            packed=empty(n * d // 2, dtype=byte),
            code=empty(16, dtype=fp32),
            absmax=empty(blocks, dtype=byte),
            shape=(n, d),
            block=64,
            absmax_code=empty(256, dtype=fp32),
            absmax_scale=empty(-(-blocks // 256), dtype=fp32),
            absmax_offset=empty(dtype=fp32),
            absmax_block=256,
        )
    adapter = None
    if rank:
        adapter = Adapter(empty(rank, d, dtype=fp32), empty(n, rank, dtype=fp32), 0.5)
    return Layer(weight, empty(n) if with_bias else None, adapter)
