"""Attention over one part of the cached tokens, and the combination of parts: device functions.

`attend_own` takes one row over a split of its own tokens, `attend_prefixes` a block of rows over a
split of the prefixes they share, and `combine` averages what both left for a row. Scores are scaled
for powers of 2.
"""

import triton
import triton.language as tl

from .dot_triton import dot

_LOG2E = tl.constexpr(1.4426950408889634)
LOG_SUM = tl.constexpr(4)
"""A part is (GROUP, D + 4) fp32: outputs, and at D the logarithm of the sum of their weights; the
rest keeps rows at multiples of 16 bytes."""
_LOWEST = tl.constexpr(-1e30)
"""Peak of no score: finite, so that a part without a token has weight 0 and not NaN."""


@triton.jit
def first_flag(flags, index, after, COUNT: tl.constexpr):
    """Find the first index beyond `after` that has a flag; COUNT if there is none."""
    return tl.min(tl.where(flags & (index > after), index, COUNT))


@triton.jit
def own_splits_used(own_len, splits, BLOCK: tl.constexpr):
    """Count the splits of a row's own tokens that have something to do: one for each block."""
    return tl.minimum(splits, tl.maximum(tl.cdiv(own_len - 1, BLOCK), 1))


@triton.jit
def _rotate(X, cos, sin, channels, D: tl.constexpr):
    """Compute x·cos + (−x2, x1)·sin of the rows at X, with each product rounded as in PyTorch."""
    dtype = X.dtype.element_ty
    x = tl.load(X + channels).to(tl.float32)
    other = tl.load(X + (channels + D // 2) % D).to(tl.float32)
    other = tl.where(channels < D // 2, -other, other)
    return ((x * cos).to(dtype).to(tl.float32) + (other * sin).to(dtype).to(tl.float32)).to(dtype)


@triton.jit
def attend_own(
    Q, q_stride, K, k_stride, V, v_stride, COS, SIN, KEYS, VALUES, token_stride, head_stride,
    SPANS, PART, scale, row, head, split, splits,
    GROUP: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    SHARED: tl.constexpr,
):  # fmt: skip
    """Attend with the GROUP queries of a (row, kv head) over one split of the row's own tokens.

    If prefixes are not SHARED, over its prefix and its own tokens. The first split stores the new
    key and value, and has them in registers. PARTS, LOG_SUMS: where the split's results go.

    Products are transposed: tokens and channels are the long side of the tensor cores' tiles, and
    the 6 or 7 query heads of a kv head are the short side, padded to 8 instead of 16.
    """
    own_start = tl.load(SPANS + row * 4 + 2)
    own_cached = tl.load(SPANS + row * 4 + 3) - 1
    prefix_start, prefix_len = own_start, 0
    if not SHARED:
        prefix_start = tl.load(SPANS + row * 4)
        prefix_len = tl.load(SPANS + row * 4 + 1)
    cached = prefix_len + own_cached
    channels = tl.arange(0, D)
    heads = tl.arange(0, PADDED)
    dtype = Q.dtype.element_ty
    cos = tl.load(COS + row * D + channels).to(tl.float32)
    sin = tl.load(SIN + row * D + channels).to(tl.float32)
    k = _rotate(K + row * k_stride + head * D, cos, sin, channels, D)
    v = tl.load(V + row * v_stride + head * D + channels)
    new = (own_start + own_cached).to(tl.int64) * token_stride + head * head_stride
    if split == 0:
        tl.store(KEYS + new + channels, k)
        tl.store(VALUES + new + channels, v)
    q_heads = Q + row * q_stride + (head * GROUP + heads % GROUP)[:, None] * D
    q = _rotate(q_heads, cos[None, :], sin[None, :], channels[None, :], D)

    scale = scale * _LOG2E
    # Peak, sum and weighted values so far: of the new token in the first split, else of no token
    new_score = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], 1) * scale
    peak = tl.where(split == 0, new_score, _LOWEST)
    total = tl.where(split == 0, tl.full((PADDED,), 1.0, tl.float32), 0.0)
    out = tl.where(split == 0, v.to(tl.float32)[:, None], tl.zeros((D, PADDED), tl.float32))
    q = tl.trans(q)
    blocks = tl.cdiv(cached, BLOCK)
    for block in tl.range(blocks * split // splits, blocks * (split + 1) // splits):
        index = block * BLOCK + tl.arange(0, BLOCK)
        inside = index < cached
        token = tl.where(index < prefix_len, prefix_start, own_start - prefix_len) + index
        at = token.to(tl.int64) * token_stride + head * head_stride
        key = tl.load(KEYS + at[:, None] + channels[None, :], mask=inside[:, None], other=0.0)
        score = dot(key, q, tl.zeros((BLOCK, PADDED), tl.float32))
        score = tl.where(inside[:, None], score * scale, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(score, 0))
        p = tl.exp2(score - new_peak[None, :])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(p, 0)
        value = tl.load(VALUES + at[None, :] + channels[:, None], mask=inside[None, :], other=0.0)
        out = dot(value, p.to(dtype), out * shrink[None, :])
        peak = new_peak

    real = heads < GROUP
    out = tl.trans(out / total[None, :])
    part = PART + heads * (D + LOG_SUM)
    tl.store(part[:, None] + channels[None, :], out, mask=real[:, None])
    tl.store(part + D, peak + tl.log2(total), mask=real)


@triton.jit
def attend_prefixes(
    Q, q_stride, COS, SIN, KEYS, VALUES, token_stride, head_stride,
    SPANS, PARTS, row_stride, scale, first_row, rows, head, split, splits,
    GROUP: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    ROWS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Attend with the queries of ROWS rows, for one kv head, over one split of their prefixes.

    The split is one of the blocks of tokens of all different prefixes of the rows, one after the
    other. Each prefix is read once for all rows that have it, wherever in the block of rows they
    are, and multiplied with the queries of all rows; the results of the other rows are dropped.

    PARTS, LOG_SUMS: where this split's results of row 0 go; those of other rows follow at
    part_stride, in parts. The queries of a row are padded to HEADS, a part has PADDED.
    """
    channels = tl.arange(0, D)
    half = tl.arange(0, D // 2)
    columns = tl.arange(0, ROWS * HEADS)
    heads = columns % HEADS
    exists = (first_row + columns // HEADS < rows) & (heads < GROUP)
    row = tl.minimum(first_row + columns // HEADS, rows - 1).to(tl.int64)
    start = tl.load(SPANS + row * 4)
    length = tl.load(SPANS + row * 4 + 1)
    cos = tl.load(COS + row[:, None] * D + channels[None, :]).to(tl.float32)
    sin = tl.load(SIN + row[:, None] * D + channels[None, :]).to(tl.float32)
    q_heads = Q + row[:, None] * q_stride + (head * GROUP + heads % GROUP)[:, None] * D
    q = _rotate(q_heads, cos, sin, channels[None, :], D)
    part = PARTS + (row * row_stride + heads) * (D + LOG_SUM)

    scale = scale * _LOG2E
    index = tl.arange(0, ROWS)
    leads, blocks = _leaders(SPANS, first_row, index, rows, BLOCK)
    blocks = tl.sum(blocks)
    begin, end = blocks * split // splits, blocks * (split + 1) // splits
    leader = first_flag(leads, index, -1, ROWS)
    while leader < ROWS:
        its_start = tl.load(SPANS + (first_row + leader) * 4)
        its_length = tl.load(SPANS + (first_row + leader) * 4 + 1)
        peak = tl.full((ROWS * HEADS,), _LOWEST, tl.float32)
        total = tl.zeros((ROWS * HEADS,), tl.float32)
        low = tl.zeros((ROWS * HEADS, D // 2), tl.float32)
        high = tl.zeros((ROWS * HEADS, D // 2), tl.float32)
        blocks = tl.cdiv(its_length, BLOCK)
        for block in tl.range(tl.maximum(begin, 0), tl.minimum(end, blocks)):
            token = block * BLOCK + tl.arange(0, BLOCK)
            inside = token < its_length
            at = (its_start + token).to(tl.int64) * token_stride + head * head_stride
            key = tl.load(KEYS + at[None, :] + channels[:, None], mask=inside[None, :], other=0.0)
            score = dot(q, key, tl.zeros((ROWS * HEADS, BLOCK), tl.float32))
            score = tl.where(inside[None, :], score * scale, -float("inf"))
            new_peak = tl.maximum(peak, tl.max(score, 1))
            p = tl.exp2(score - new_peak[:, None])
            shrink = tl.exp2(peak - new_peak)
            total = total * shrink + tl.sum(p, 1)
            p = p.to(KEYS.dtype.element_ty)
            value_at = VALUES + at[:, None] + half[None, :]
            value = tl.load(value_at, mask=inside[:, None], other=0.0)
            low = dot(p, value, low * shrink[:, None])
            value = tl.load(value_at + D // 2, mask=inside[:, None], other=0.0)
            high = dot(p, value, high * shrink[:, None])
            peak = new_peak

        has_it = exists & (start == its_start) & (length == its_length)
        tl.store(part + D, peak + tl.log2(total), mask=has_it)
        not_empty = (has_it & (total > 0))[:, None]
        out = part[:, None] + half[None, :]
        tl.store(out, low / total[:, None], mask=not_empty)
        tl.store(out + D // 2, high / total[:, None], mask=not_empty)
        begin, end = begin - blocks, end - blocks  # counted from the next prefix's first block
        leader = first_flag(leads, index, leader, ROWS)


@triton.jit
def _leaders(SPANS, first_row, index, rows, BLOCK: tl.constexpr):
    """Find which rows of a block are the first that have their prefix, and its blocks of tokens.

    Returns a flag and a number for each row; 0 blocks for the others.
    """
    at = SPANS + tl.minimum(first_row + index, rows - 1) * 4
    start = tl.load(at)
    length = tl.load(at + 1)
    same = (start[:, None] == start[None, :]) & (length[:, None] == length[None, :])
    earlier = index[None, :] < index[:, None]
    leads = (tl.sum((same & earlier).to(tl.int32), 1) == 0) & (length > 0)
    return leads, tl.where(leads, tl.cdiv(length, BLOCK), 0)


@triton.jit
def combine(PARTS, OUT, begin, end, GROUP: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr):
    """Average the parts from `begin` to `end` of a (row, kv head), weighted with their sums.

    One of them is not empty: it has the new token. OUT: where the (GROUP, D) go.
    """
    heads = tl.arange(0, PADDED)[:, None] + tl.zeros((1, D), tl.int32)
    channels = tl.arange(0, D)[None, :]
    part = PARTS + heads * (D + LOG_SUM)
    peak = tl.full((PADDED, D), _LOWEST, tl.float32)
    total = tl.zeros((PADDED, D), tl.float32)
    out = tl.zeros((PADDED, D), tl.float32)
    for first in tl.range(begin, end, 4):
        for i in tl.static_range(4):  # four parts are loaded at a time
            exists = (heads < GROUP) & (first + i < end)
            at = part + (first + i) * GROUP * (D + LOG_SUM)
            log_sum = tl.load(at + D, mask=exists, other=-float("inf"), cache_modifier=".cg")
            values = tl.load(at + channels, mask=exists, other=0.0, cache_modifier=".cg")
            new_peak = tl.maximum(peak, log_sum)
            shrink = tl.exp2(peak - new_peak)
            weight = tl.exp2(log_sum - new_peak)
            total = total * shrink + weight
            # An empty part was not stored
            out = out * shrink + tl.where(log_sum == -float("inf"), 0.0, weight * values)
            peak = new_peak
    out = (out / total).to(OUT.dtype.element_ty)
    tl.store(OUT + heads * D + channels, out, mask=heads < GROUP)
