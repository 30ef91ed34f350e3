"""Dequantisation in Triton: a tile of a weight, for kernels that multiply with it.

Layout and arithmetic are those of bitsandbytes (four_bit/__init__.py, reference.py).
"""

import triton
import triton.language as tl

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
    BLOCKS: tl.constexpr = DEPTH // BLOCK
    row = row_index.to(tl.int64)
    byte = tl.arange(0, DEPTH // 2)
    start = tl.multiple_of(row * (D // 2), BLOCK // 2) + k // 2
    inside = (k + 2 * byte < D)[None, :]
    packed = tl.load(PACKED + start[:, None] + byte[None, :], mask=inside, other=0).to(tl.int32)
    levels = tl.join(tl.load(CODE + (packed >> 4)), tl.load(CODE + (packed & 15)))
    scale = _load_scales(
        ABSMAX, ABSMAX_CODE, ABSMAX_SCALE, ABSMAX_OFFSET, row, k, D,
        BLOCKS, BLOCK, ABSMAX_BLOCK, NESTED,
    )  # fmt: skip
    levels = tl.reshape(levels, (row_index.shape[0], BLOCKS, BLOCK)) * scale[:, :, None]
    return tl.reshape(levels.to(dtype), (row_index.shape[0], DEPTH))


@triton.jit
def _load_scales(
    ABSMAX, ABSMAX_CODE, ABSMAX_SCALE, ABSMAX_OFFSET, row, k, D,
    BLOCKS: tl.constexpr, BLOCK: tl.constexpr, ABSMAX_BLOCK: tl.constexpr, NESTED: tl.constexpr,
):  # fmt: skip
    """Load the fp32 scales of BLOCKS blocks of each row from column k on, 0 from D on."""
    column = k // BLOCK + tl.arange(0, BLOCKS)
    block = row[:, None] * (D // BLOCK) + column[None, :]
    inside = (column < D // BLOCK)[None, :]
    if not NESTED:
        return tl.load(ABSMAX + block, mask=inside, other=0.0)
    number = tl.load(ABSMAX + block, mask=inside, other=0).to(tl.int32)
    scale = tl.load(ABSMAX_SCALE + block // ABSMAX_BLOCK, mask=inside, other=0.0)
    # The addition of 0 keeps the compiler from rounding once for product and offset
    scale = tl.fma(tl.load(ABSMAX_CODE + number), scale, 0.0) + tl.load(ABSMAX_OFFSET)
    return tl.where(inside, scale, 0.0)
