"""A stand-in of linears' own for four_bit's device function: plain loads, one for each level."""

import triton
import triton.language as tl


@triton.jit
def load_four_bits(
    PACKED, CODE, ABSMAX, ABSMAX_CODE, ABSMAX_SCALE, ABSMAX_OFFSET, row_index, k, D,
    DEPTH: tl.constexpr, BLOCK: tl.constexpr, ABSMAX_BLOCK: tl.constexpr, NESTED: tl.constexpr,
    dtype: tl.constexpr,
):  # fmt: skip
    """Load columns k … k + DEPTH of some rows of a weight in 4 bits, in `dtype`."""
    BLOCKS: tl.constexpr = DEPTH // BLOCK
    first = row_index.to(tl.int64) * D + k
    byte = first[:, None] // 2 + tl.arange(0, DEPTH // 2)[None, :]
    packed = tl.load(PACKED + byte, eviction_policy="evict_first").to(tl.int32)
    level = tl.load(CODE + tl.interleave(packed >> 4, packed & 15))
    block = first[:, None] // BLOCK + tl.arange(0, BLOCKS)[None, :]
    scale = tl.load(ABSMAX + block)
    if NESTED:
        factor = tl.load(ABSMAX_SCALE + block // ABSMAX_BLOCK)
        scale = tl.load(ABSMAX_CODE + scale.to(tl.int32)) * factor + tl.load(ABSMAX_OFFSET)
    ROWS: tl.constexpr = row_index.shape[0]
    weight = tl.reshape(level, (ROWS, BLOCKS, BLOCK)) * scale[:, :, None]
    return tl.reshape(weight, (ROWS, DEPTH)).to(dtype)
