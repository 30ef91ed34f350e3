"""Dequantisation in Triton: tiles of a weight for kernels that multiply with it, and whole weights.

Layout and arithmetic are those of bitsandbytes (four_bit/__init__.py, reference.py). A product with
few rows reads a quarter of the bytes that it reads of 16 bits, and has time for 5 instructions per
number on an H100, and 10 on an RTX 3090 or 4090. So a number takes 3.5: a shift, a shuffle, a
multiplication, half a conversion. Whole weights take the time of writing them.

For the loop of a product (machine code of Triton 3.6 and 3.7): before Hopper and on sm_120, Triton
lets two warps dequantise the same rows if x has more than 16 rows for 64 of the weight. Two tiles
and products in the body of the loop keep it from that.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from ..launch import launch
from .weight import FourBitWeight

NUMBERS = 4096
"""Numbers of a whole weight that a program computes: a thread has 32 of them, 16 bytes."""
_SHUFFLED = tl.constexpr(not triton.knobs.runtime.interpret and torch.version.hip is None)
"""Whether numbers are looked up by PTX."""


def _look_up(shift: int) -> str:
    """Write the PTX that looks up the levels of 4 bytes' halves `shift` bits up.

    A thread holds the level of its own number in the warp, modulo 16; a shuffle reads that of
    another thread. It takes the last 5 bits of a number, so that no mask is needed. ptxas loads the
    level once for all the code that holds this, mostly before a loop.
    """
    lines = [
        ".reg .b32 lane, level, source; .reg .b64 at;",
        "mov.u32 lane, %laneid; and.b32 lane, lane, 15;",
        "mad.wide.u32 at, lane, 4, $5; ld.global.nc.b32 level, [at];",
    ]
    for i in range(4):
        lines.append(f"shr.b32 source, $4, {8 * i + shift};")
        lines.append(f"shfl.sync.idx.b32 ${i}, level, source, 31, -1;")
    return "{" + "\n".join(lines) + "}"


_HIGH, _LOW = tl.constexpr(_look_up(4)), tl.constexpr(_look_up(0))

# --- device functions ---------------------------------------------------------------------------


@triton.jit
def load_four_bits(
    PACKED, CODE, ABSMAX, ABSMAX_CODE, ABSMAX_SCALE, ABSMAX_OFFSET, row_index, k, D,
    DEPTH: tl.constexpr, BLOCK: tl.constexpr, ABSMAX_BLOCK: tl.constexpr, NESTED: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """Load rows `row_index` (N,) of a weight with D columns, from column k on: (N, DEPTH).

    The columns from D on are 0. D, k and DEPTH are multiples of BLOCK.
    """
    ROWS: tl.constexpr = row_index.shape[0]
    BLOCKS: tl.constexpr = DEPTH // BLOCK
    BYTES: tl.constexpr = BLOCK // 2
    row = row_index.to(tl.int64)
    left = D // BLOCK - k // BLOCK

    # So written, the compiler sees that 16 bytes can be loaded at a time
    byte = tl.arange(0, BLOCKS * BYTES)
    at = row * (D // BLOCK * BYTES) + k // BLOCK * BYTES
    inside = (byte < left * BYTES)[None, :]
    packed = tl.load(PACKED + at[:, None] + byte[None, :], mask=inside, other=0)
    packed = tl.reshape(packed, (ROWS, BLOCKS, BYTES))

    block = tl.arange(0, BLOCKS)
    at = (row * (D // BLOCK) + k // BLOCK)[:, None] + block[None, :]
    inside = (block < left)[None, :]
    scale, code = _load_scales(
        CODE, ABSMAX, ABSMAX_CODE, ABSMAX_SCALE, ABSMAX_OFFSET, at, inside, ABSMAX_BLOCK, NESTED
    )
    scale, code = scale[:, :, None], code[:, :, None]
    high = _levels(packed, CODE, code, True) * scale
    low = _levels(packed, CODE, code, False) * scale
    return tl.reshape(tl.join(high, low).to(dtype), (ROWS, DEPTH))


@triton.jit
def _load_scales(
    CODE, ABSMAX, ABSMAX_CODE, ABSMAX_SCALE, ABSMAX_OFFSET, at, inside,
    ABSMAX_BLOCK: tl.constexpr, NESTED: tl.constexpr,
):  # fmt: skip
    """Load the fp32 scales of the blocks `at` (N, BLOCKS), and for each the address of CODE.

    Triton moves packed numbers, and not levels, between threads only if it can compute all operands
    of the levels from loads. Thus 0, the upper half of a loaded number, is added to the address.
    """
    scale = tl.load(ABSMAX + at, mask=inside, other=0)
    if NESTED:
        number = scale.to(tl.int32)
        scale = tl.load(ABSMAX_SCALE + at // ABSMAX_BLOCK, mask=inside, other=0.0)
        # The addition of 0 keeps the compiler from rounding once for product and offset
        scale = tl.fma(tl.load(ABSMAX_CODE + number), scale, 0.0) + tl.load(ABSMAX_OFFSET)
        scale = tl.where(inside, scale, 0.0)
    else:
        number = scale.to(tl.uint32, bitcast=True)
    return scale, CODE.to(tl.int64) + (number.to(tl.uint64) >> 32).to(tl.int64)


@triton.jit
def _levels(packed, CODE, code, HIGH: tl.constexpr):
    """Look up the fp32 level of each byte's high or low half; code is the address of CODE."""
    if not _SHUFFLED:
        return tl.load(CODE + (packed >> 4 if HIGH else packed & 15).to(tl.int32))
    return tl.inline_asm_elementwise(
        _HIGH if HIGH else _LOW, "=f,=f,=f,=f,r,l,l,l,l", [packed, code],
        dtype=tl.float32, is_pure=True, pack=4,
    )  # fmt: skip


# --- kernel -------------------------------------------------------------------------------------


@triton.jit
def _dequantise_kernel(
    OUT, WEIGHTS, COUNT: tl.constexpr, BLOCK: tl.constexpr, ABSMAX_BLOCK: tl.constexpr,
    NESTED: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """Compute TILE blocks of one of COUNT weights, which lie one after the other in OUT."""
    tile = tl.program_id(0)
    for i in tl.static_range(COUNT):
        weight = WEIGHTS[i]
        tiles = tl.cdiv(weight.blocks, TILE)
        if (tile >= 0) & (tile < tiles):
            block = tile * TILE + tl.arange(0, TILE)
            # A block is a row here, and where there are no more, the last row again
            w = load_four_bits(
                weight.packed, weight.code, weight.absmax,
                weight.absmax_code, weight.absmax_scale, weight.absmax_offset,
                tl.minimum(block, weight.blocks - 1), 0, BLOCK,
                BLOCK, BLOCK, ABSMAX_BLOCK, NESTED, OUT.dtype.element_ty,
            )  # fmt: skip
            at = block.to(tl.int64)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
            tl.store(OUT + at, w, mask=(block < weight.blocks)[:, None])
        tile -= tiles
        OUT += weight.blocks.to(tl.int64) * BLOCK


# --- launcher -----------------------------------------------------------------------------------


class _Stored(NamedTuple):
    """What the kernel reads of a FourBitWeight."""

    packed: Tensor
    code: Tensor
    absmax: Tensor
    absmax_code: Tensor | None
    absmax_scale: Tensor | None
    absmax_offset: Tensor | None
    blocks: int

    @classmethod
    def of(cls, weight: FourBitWeight) -> _Stored:
        """Take the tensors of a weight."""
        tensors = [getattr(weight, name) for name in cls._fields[:-1]]
        return cls(*tensors, blocks=weight.absmax.numel())


def dequantise(weights: Sequence[FourBitWeight], out: Tensor) -> None:
    """Write weights of equal blocks, one below the other, into `out` (ΣN, D)."""
    stored, first = tuple(map(_Stored.of, weights)), weights[0]
    tile = max(1, NUMBERS // first.block)
    launch(
        _dequantise_kernel, (sum(triton.cdiv(each.blocks, tile) for each in stored),), out.device,
        out, stored, COUNT=len(stored), BLOCK=first.block, ABSMAX_BLOCK=first.absmax_block,
        NESTED=first.absmax_code is not None, TILE=tile,
    )  # fmt: skip
