"""Attention over one part of the cached tokens, and the combination of parts: device functions.

`attend_own` takes one row over a split of its own tokens, `attend_prefix` a block of rows over a
split of a prefix that they share, and `combine` averages what both left for a row. Exponentials and
logarithms are those of 2.

A part is (GROUP, D + 4) fp32: the outputs of each head, and at D the logarithm of the sum of their
weights. The parts of a (row, kv head) lie together, those of its own tokens first.
"""

import triton
import triton.language as tl

from .dot_triton import dot

_LOG2E = tl.constexpr(1.4426950408889634)


@triton.jit
def own_parts(own_len, splits, BLOCK: tl.constexpr):
    """Count the parts of a row's own tokens: a split of them is a part if it has a block."""
    return tl.minimum(splits, tl.maximum(tl.cdiv(own_len - 1, BLOCK), 1))


@triton.jit
def _weighted(x, inverse_rms, WEIGHT, channels, dtype: tl.constexpr):
    """Scale x, and multiply it with the weights of its channels; both results are rounded."""
    weight = tl.load(WEIGHT + channels).to(tl.float32)
    return ((x * inverse_rms).to(dtype).to(tl.float32) * weight).to(dtype).to(tl.float32)


@triton.jit
def _rotate(X, WEIGHT, eps, cos, sin, channels, D: tl.constexpr):
    """Compute x·cos + (−x2, x1)·sin of the rows at X, with each product rounded as in PyTorch.

    WEIGHT: of the rows' RMS norm, which comes first; None without one.
    """
    dtype = X.dtype.element_ty
    opposite = (channels + D // 2) % D
    x = tl.load(X + channels).to(tl.float32)
    other = tl.load(X + opposite).to(tl.float32)
    if WEIGHT is not None:
        inverse_rms = tl.rsqrt(tl.sum(x * x, -1, keep_dims=True) / D + eps)
        x = _weighted(x, inverse_rms, WEIGHT, channels, dtype)
        other = _weighted(other, inverse_rms, WEIGHT, opposite, dtype)
    other = tl.where(channels < D // 2, -other, other)
    return ((x * cos).to(dtype).to(tl.float32) + (other * sin).to(dtype).to(tl.float32)).to(dtype)


@triton.jit
def _weigh(score, peak, total, AXIS: tl.constexpr):
    """Weigh a block of tokens, AXIS of the scores, by their distance from the largest score so far.

    Returns the weights, what earlier sums shrink by, the sum of weights so far, and the new peak.
    """
    new_peak = tl.maximum(peak, tl.max(score, AXIS))
    p = tl.exp2(score - tl.expand_dims(new_peak, AXIS))
    shrink = tl.exp2(peak - new_peak)
    return p, shrink, total * shrink + tl.sum(p, AXIS), new_peak


@triton.jit
def attend_own(
    Q, q_stride, K, k_stride, V, v_stride, Q_NORM, K_NORM, eps, COS, SIN,
    KEYS, VALUES, token_stride, head_stride, SPANS, PARTS, first_part,
    scale, row, head, split, splits,
    GROUP: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    SHARED: tl.constexpr,
):  # fmt: skip
    """Attend with the GROUP queries of a (row, kv head) over one split of the row's own tokens.

    If prefixes are not SHARED, over its prefix and its own tokens. The first split stores the new
    key and value, and has them in registers. PARTS: where the split's results go.

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
    k = _rotate(K + row * k_stride + head * D, K_NORM, eps, cos, sin, channels, D)
    v = tl.load(V + row * v_stride + head * D + channels)
    new = (own_start + own_cached).to(tl.int64) * token_stride + head * head_stride
    if split == 0:
        tl.store(KEYS + new + channels, k)
        tl.store(VALUES + new + channels, v)
    q_heads = Q + row * q_stride + (head * GROUP + heads % GROUP)[:, None] * D
    q = _rotate(q_heads, Q_NORM, eps, cos[None, :], sin[None, :], channels[None, :], D)

    scale = scale * _LOG2E
    # Peak, sum and weighted values so far: of the new token in the first split, else of no token
    new_score = tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], 1) * scale
    peak = tl.where(split == 0, new_score, -float("inf"))
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
        p, shrink, total, peak = _weigh(score, peak, total, 0)
        value = tl.load(VALUES + at[None, :] + channels[:, None], mask=inside[None, :], other=0.0)
        out = dot(value, p.to(dtype), out * shrink[None, :])

    real = heads < GROUP
    out = tl.trans(out / total[None, :])
    part = PARTS + (first_part + split * GROUP + heads) * (D + 4)
    tl.store(part[:, None] + channels[None, :], out, mask=real[:, None])
    tl.store(part + D, peak + tl.log2(total), mask=real)


@triton.jit
def prefix_parts(SPANS, first_row, rows, splits, SPLIT: tl.constexpr, ROWS: tl.constexpr):
    """Divide the splits of a block of ROWS rows among the different prefixes of these rows.

    Split s takes prefix s % count, and is the (s // count)-th part of it if the prefix has enough
    tokens: SPLIT for each part but the last. Rows beyond the last one are copies of it.

    Returns the number of each row's prefix, −1 without one; how many parts it has; and the count of
    prefixes, at least 1.
    """
    index = tl.arange(0, ROWS)
    at = SPANS + tl.minimum(first_row + index, rows - 1) * 4
    start = tl.load(at)
    length = tl.load(at + 1)
    same = (start[:, None] == start[None, :]) & (length[:, None] == length[None, :])
    # A prefix is counted where a row has it first
    earlier = (same & (index[:, None] < index[None, :])).to(tl.int32)
    counted = ((tl.sum(earlier, 0) == 0) & (length > 0))[None, :]
    first = tl.min(tl.where(same, index[None, :], ROWS), 1)
    number = tl.sum((counted & (index[None, :] < first[:, None])).to(tl.int32), 1)
    count = tl.maximum(tl.sum(counted.to(tl.int32)), 1)
    parts = tl.minimum((splits - number + count - 1) // count, tl.cdiv(length, SPLIT))
    return tl.where(length > 0, number, -1), parts, count


@triton.jit
def attend_prefix(
    Q, q_stride, Q_NORM, eps, COS, SIN, KEYS, VALUES, token_stride, head_stride,
    SPANS, PARTS, size, scale, first_row, leader, rows, head, split, splits, own_splits,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    OWN_BLOCK: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Attend with the queries of ROWS rows, for one kv head, over one split of the leader's prefix.

    The queries are the long side of the products, a row's being padded to HEADS. Those of rows that
    do not have this prefix are multiplied, too, but not stored. size: heads in the parts of a
    (row, kv head).
    """
    channels = tl.arange(0, D)
    column = tl.arange(0, ROWS * HEADS)
    heads = column % HEADS
    row = tl.minimum(first_row + column // HEADS, rows - 1).to(tl.int64)
    cos = tl.load(COS + row[:, None] * D + channels[None, :]).to(tl.float32)
    sin = tl.load(SIN + row[:, None] * D + channels[None, :]).to(tl.float32)
    q_heads = Q + row[:, None] * q_stride + (head * GROUP + heads % GROUP)[:, None] * D
    q = _rotate(q_heads, Q_NORM, eps, cos, sin, channels[None, :], D)

    scale = scale * _LOG2E
    start = tl.load(SPANS + (first_row + leader) * 4)
    length = tl.load(SPANS + (first_row + leader) * 4 + 1)
    peak = tl.full((ROWS * HEADS,), -float("inf"), tl.float32)
    total = tl.zeros((ROWS * HEADS,), tl.float32)
    # In halves, Triton gives each warp queries of its own, and p stays in the warp's registers
    half = tl.arange(0, D // 2)
    low = tl.zeros((ROWS * HEADS, D // 2), tl.float32)
    high = tl.zeros((ROWS * HEADS, D // 2), tl.float32)
    blocks = tl.cdiv(length, BLOCK)
    for block in tl.range(blocks * split // splits, blocks * (split + 1) // splits):
        token = block * BLOCK + tl.arange(0, BLOCK)
        inside = token < length
        at = (start + token).to(tl.int64) * token_stride + head * head_stride
        key = tl.load(KEYS + at[None, :] + channels[:, None], mask=inside[None, :], other=0.0)
        score = dot(q, key, tl.zeros((ROWS * HEADS, BLOCK), tl.float32))
        score = tl.where(inside[None, :], score * scale, -float("inf"))
        p, shrink, total, peak = _weigh(score, peak, total, 1)
        p = p.to(KEYS.dtype.element_ty)
        value_at = VALUES + at[:, None] + half[None, :]
        value = tl.load(value_at, mask=inside[:, None], other=0.0)
        low = dot(p, value, low * shrink[:, None])
        value = tl.load(value_at + D // 2, mask=inside[:, None], other=0.0)
        high = dot(p, value, high * shrink[:, None])

    spans = SPANS + row * 4
    has_it = (tl.load(spans) == start) & (tl.load(spans + 1) == length)
    has_it &= (first_row + column // HEADS < rows) & (heads < GROUP)
    number = own_parts(tl.load(spans + 3), own_splits, OWN_BLOCK) + split
    part = PARTS + ((row * KV_HEADS + head) * size + number * GROUP + heads) * (D + 4)
    out = part[:, None] + half[None, :]
    tl.store(out, low / total[:, None], mask=has_it[:, None])
    tl.store(out + D // 2, high / total[:, None], mask=has_it[:, None])
    tl.store(part + D, peak + tl.log2(total), mask=has_it)


@triton.jit
def combine(
    PARTS, OUT, ARRIVED, pair, size, count,
    GROUP: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr,
):  # fmt: skip
    """Average the parts of a (row, kv head), weighted with their sums, and reset its counter.

    size: heads in the parts of a (row, kv head), of which the first `count` parts are there.
    """
    tl.store(ARRIVED + pair, 0)  # for the next launch
    heads = tl.arange(0, PADDED)[:, None] + tl.zeros((1, D), tl.int32)
    channels = tl.arange(0, D)[None, :]
    part = PARTS + (pair * size + heads) * (D + 4)
    peak = tl.full((PADDED, D), -float("inf"), tl.float32)
    total = tl.zeros((PADDED, D), tl.float32)
    out = tl.zeros((PADDED, D), tl.float32)
    for first in tl.range(0, count, 4):
        for i in tl.static_range(4):  # four parts are loaded at a time
            exists = (heads < GROUP) & (first + i < count)
            at = part + (first + i) * (GROUP * (D + 4))
            log_sum = tl.load(at + D, mask=exists, other=-float("inf"), cache_modifier=".cg")
            values = tl.load(at + channels, mask=exists, other=0.0, cache_modifier=".cg")
            new_peak = tl.maximum(peak, log_sum)
            shrink = tl.exp2(peak - new_peak)
            weight = tl.exp2(log_sum - new_peak)
            total = total * shrink + weight
            out = out * shrink + weight * values
            peak = new_peak
    out = (out / total).to(OUT.dtype.element_ty)
    tl.store(OUT + (pair * GROUP + heads) * D + channels, out, mask=heads < GROUP)
