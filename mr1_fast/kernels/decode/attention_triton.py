"""Attention of a decode step in Triton: device functions, the kernel, its launcher.

`attend` is one launch. The cached tokens of a (row, kv head) are split over programs, as in
flash-decoding. Every program rotates the queries for itself, and the first one has the new token in
registers, so none waits for what another writes to the pool. The last program to finish combines
the parts. Products are transposed: tokens and channels are the long side of the tensor cores'
tiles, and the 6 or 7 query heads of a kv head are the short side, padded to 8 instead of 16.

Lengths and the number of splits are run-time data, and nothing is read on the host, so a CUDA graph
can hold the launch, after a first one outside of it.
"""

from functools import lru_cache

import torch
import triton
import triton.language as tl

from ..launch import launch
from .dot_triton import dot

BLOCK_BYTES = 128
"""Bytes of one channel in a block of tokens: 64 tokens of 16 bits."""
STAGES = 3
"""Blocks in shared memory at a time, 67 KB in all, where the smallest GPUs have 99 KB."""
PROGRAMS_PER_SM = 3
"""Programs that an H100's multiprocessor holds; where fewer fit, the others wait for their end."""
MAX_SPLITS = 16
"""Most programs for one (row, kv head)."""
MAX_PAIRS = 2**16
"""Most pairs of a row and a kv head in a launch."""
_LOG2E = tl.constexpr(1.4426950408889634)

# --- device functions ---------------------------------------------------------------------------


@triton.jit
def _rotate(X, cos, sin, columns, D: tl.constexpr):
    """Compute x·cos + (−x2, x1)·sin of the rows at X, with each product rounded as in PyTorch."""
    dtype = X.dtype.element_ty
    x = tl.load(X + columns).to(tl.float32)
    other = tl.load(X + (columns + D // 2) % D).to(tl.float32)
    other = tl.where(columns < D // 2, -other, other)
    return ((x * cos).to(dtype).to(tl.float32) + (other * sin).to(dtype).to(tl.float32)).to(dtype)


@triton.jit
def _combine(parts, log_sums, splits, D: tl.constexpr, PADDED: tl.constexpr):
    """Average the splits' outputs, weighted with their sums: (D, PADDED).

    The first split is never empty: it has the new token.
    """
    heads = tl.zeros((D, 1), tl.int32) + tl.arange(0, PADDED)[None, :]
    inside = tl.arange(0, D)[:, None] * PADDED + heads
    peak = tl.full((D, PADDED), -float("inf"), tl.float32)
    total = tl.zeros((D, PADDED), tl.float32)
    out = tl.zeros((D, PADDED), tl.float32)
    for begin in tl.range(0, splits, 4):
        for i in tl.static_range(4):  # four splits are loaded at a time
            at = begin + i
            exists = inside < (splits - at) * D * PADDED
            log_sum = tl.load(
                log_sums + at * PADDED + heads,
                mask=exists,
                other=-float("inf"),
                cache_modifier=".cg",
            )
            part = tl.load(
                parts + at * D * PADDED + inside, mask=exists, other=0.0, cache_modifier=".cg"
            )
            new_peak = tl.maximum(peak, log_sum)
            shrink = tl.exp2(peak - new_peak)
            weight = tl.exp2(log_sum - new_peak)
            total = total * shrink + weight
            out = out * shrink + weight * part
            peak = new_peak
    return out / total


# --- kernel -------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=["SPANS"])
def _attend_kernel(Q, q_stride, K, k_stride, V, v_stride, COS, SIN,
                   KEYS, VALUES, token_stride, head_stride,
                   SPANS, OUT, PARTS, LOG_SUMS, ARRIVED, scale, splits,
                   GROUP: tl.constexpr, PADDED: tl.constexpr,
                   D: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Attend with the GROUP queries of a (row, kv head) over the blocks of one split."""
    row = tl.program_id(0).to(tl.int64)  # neighbouring rows share a prefix, which L2 holds
    head = tl.program_id(1)
    split = tl.program_id(2)
    prefix_start = tl.load(SPANS + row * 4)
    prefix_len = tl.load(SPANS + row * 4 + 1)
    own_start = tl.load(SPANS + row * 4 + 2)
    cached = prefix_len + tl.load(SPANS + row * 4 + 3) - 1
    columns = tl.arange(0, D)
    heads = tl.arange(0, PADDED)
    dtype = Q.dtype.element_ty
    cos = tl.load(COS + row * D + columns).to(tl.float32)
    sin = tl.load(SIN + row * D + columns).to(tl.float32)
    k = _rotate(K + row * k_stride + head * D, cos, sin, columns, D)
    v = tl.load(V + row * v_stride + head * D + columns)
    new = (own_start - prefix_len + cached).to(tl.int64) * token_stride + head * head_stride
    if split == 0:
        tl.store(KEYS + new + columns, k)
        tl.store(VALUES + new + columns, v)
    q_heads = Q + row * q_stride + (head * GROUP + heads % GROUP)[:, None] * D
    q = _rotate(q_heads, cos[None, :], sin[None, :], columns[None, :], D)

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
        key = tl.load(KEYS + at[:, None] + columns[None, :], mask=inside[:, None], other=0.0)
        score = dot(key, q, tl.zeros((BLOCK, PADDED), tl.float32))
        score = tl.where(inside[:, None], score * scale, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(score, 0))
        p = tl.exp2(score - new_peak[None, :])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(p, 0)
        value = tl.load(VALUES + at[None, :] + columns[:, None], mask=inside[None, :], other=0.0)
        out = dot(value, p.to(dtype), out * shrink[None, :])
        peak = new_peak

    pair = row * tl.num_programs(1) + head
    parts = PARTS + pair * splits * D * PADDED
    log_sums = LOG_SUMS + pair * splits * PADDED
    out = out / tl.where(total == 0, 1.0, total)[None, :]  # 0 in a split without a block
    tl.store(parts + split * D * PADDED + columns[:, None] * PADDED + heads[None, :], out)
    tl.store(log_sums + split * PADDED + heads, peak + tl.log2(total))
    tl.debug_barrier()  # all threads have stored their parts before one of them counts
    if tl.atomic_add(ARRIVED + pair, 1, sem="acq_rel", scope="gpu") == splits - 1:
        tl.debug_barrier()
        tl.store(ARRIVED + pair, 0)  # for the next launch
        combined = tl.trans(_combine(parts, log_sums, splits, D, PADDED)).to(dtype)
        out_heads = OUT + (pair * GROUP + heads)[:, None] * D
        tl.store(out_heads + columns[None, :], combined, mask=(heads < GROUP)[:, None])


# --- launcher -----------------------------------------------------------------------------------


def attend(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    cos: torch.Tensor,
    sin: torch.Tensor,
    keys: torch.Tensor,
    values: torch.Tensor,
    spans: torch.Tensor,
    scale: float,
    splits: int | None = None,
) -> torch.Tensor:
    """`operations.attend`, with `splits` programs for each row and kv head.

    None takes as many as the GPU runs at once. Raises ValueError for heads whose channels are not a
    power of two from 16 on, for more than MAX_PAIRS pairs, and for heads that are not dense.
    """
    (rows, heads, d), kv_heads = q.shape, k.shape[1]
    pairs, group = rows * kv_heads, heads // kv_heads
    if d < 16 or d & (d - 1) or pairs > MAX_PAIRS:
        raise ValueError(
            f"q has shape {tuple(q.shape)} for {kv_heads} kv heads: heads of 16, 32, 64, … "
            f"channels are needed, and at most {MAX_PAIRS} pairs of a row and a kv head"
        )
    inner = [x.stride()[1:] for x in (q, k, v)]
    if inner != [(d, 1)] * 3 or keys.stride(2) != 1 or keys.stride() != values.stride():
        raise ValueError(
            f"q, k and v have inner strides {inner}, the pools {keys.stride()} and "
            f"{values.stride()}: dense heads are needed, and pools with the same strides"
        )

    padded = max(8, triton.next_power_of_2(group))
    multiprocessors, arrived = _device(q.device)
    if splits is None:
        splits = round(PROGRAMS_PER_SM * multiprocessors / pairs)
        splits = max(1, min(MAX_SPLITS, splits))
    out = q.new_empty(rows, heads, d)
    parts = q.new_empty(pairs, splits, d, padded, dtype=torch.float32)
    log_sums = q.new_empty(pairs, splits, padded, dtype=torch.float32)
    launch(
        _attend_kernel, (rows, kv_heads, splits), q.device,
        q, q.stride(0), k, k.stride(0), v, v.stride(0), cos.contiguous(), sin.contiguous(),
        keys, values, keys.stride(0), keys.stride(1),
        spans.contiguous(), out, parts, log_sums, arrived, scale, splits,
        GROUP=group, PADDED=padded, D=d, BLOCK=BLOCK_BYTES // q.element_size(), num_stages=STAGES,
    )  # fmt: skip
    return out


@lru_cache
def _device(device: torch.device) -> tuple[int, torch.Tensor]:
    """Look up a device's multiprocessors, and counters of finished programs, (MAX_PAIRS,) int32.

    The counters are 0 between launches and serve one stream at a time. Raises RuntimeError where
    the first call on a device comes while a CUDA graph is captured.
    """
    count = 1
    if device.type == "cuda":
        if torch.cuda.is_current_stream_capturing():
            raise RuntimeError("attend must run once on a device before a CUDA graph captures it")
        count = torch.cuda.get_device_properties(device).multi_processor_count
    return count, torch.zeros(MAX_PAIRS, dtype=torch.int32, device=device)
