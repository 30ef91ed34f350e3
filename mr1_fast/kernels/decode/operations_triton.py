"""The operations of decode.py in Triton: device functions, kernels, launchers.

`attend` is one launch. A (row, kv head) is split over programs (flash-decoding), each of which rotates the queries for
itself; the first has the new token in registers, so none waits for what another writes to the pool. The last program to
finish combines the parts. Products are transposed: tokens and channels are the long side of the tensor cores' tiles, 6
or 7 query heads of a kv head the short one, of 8; the other way round it would be 16.

Lengths, temperature and the number of splits are run-time data, and nothing is read on the host: a CUDA graph can hold
the launches, after a first one outside.
"""

from contextlib import nullcontext
from functools import lru_cache

import torch
import triton
import triton.language as tl

BLOCK_BYTES = 128  # of one channel in a block of tokens: 64 tokens of 16 bits
STAGES = 3  # one block is computed on, one on its way: 67 KB of shared memory, where the smallest GPUs have 99
PROGRAMS_PER_SM = (
    3  # as many of those as an H100 holds; where there are fewer, one waits for another's end
)
MAX_SPLITS = 16
MAX_PAIRS = 2**16  # of a row and a kv head, in a launch
GATE_BLOCK = 1024
VOCABULARY_BLOCK = 4096
_INTERPRETED = tl.constexpr(bool(triton.knobs.runtime.interpret))
_LOG2E = tl.constexpr(1.4426950408889634)
_LN2 = tl.constexpr(0.6931471805599453)
_BELOW_ONE = tl.constexpr(1 - 2**-24)

# --- device functions ---------------------------------------------------------------------------------------------


@triton.jit
def _rotate(X, cos, sin, columns, D: tl.constexpr):
    """x·cos + (−x2, x1)·sin of the rows at X; PyTorch rounds the products to their dtype, so they are rounded here."""
    dtype = X.dtype.element_ty
    x = tl.load(X + columns).to(tl.float32)
    other = tl.load(X + (columns + D // 2) % D).to(tl.float32)
    other = tl.where(columns < D // 2, -other, other)
    return ((x * cos).to(dtype).to(tl.float32) + (other * sin).to(dtype).to(tl.float32)).to(dtype)


@triton.jit
def _dot(a, b, accumulator):
    if _INTERPRETED:  # it would multiply the bits of bf16
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, accumulator, input_precision="ieee")


@triton.jit
def _combine(parts, log_sums, splits, D: tl.constexpr, PADDED: tl.constexpr):
    """(D, PADDED) mean of the splits' outputs, weighted with their sums. The first is never empty."""
    heads = tl.zeros((D, 1), tl.int32) + tl.arange(0, PADDED)[None, :]
    inside = tl.arange(0, D)[:, None] * PADDED + heads
    peak = tl.full((D, PADDED), -float("inf"), tl.float32)
    total = tl.zeros((D, PADDED), tl.float32)
    out = tl.zeros((D, PADDED), tl.float32)
    for begin in tl.range(0, splits, 4):
        for i in tl.static_range(4):  # so many loads are on their way at a time
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


@triton.jit
def _load_logits(X, block, V, BANNED: tl.constexpr, BLOCK: tl.constexpr):
    """A block of a row's logits, −inf for banned tokens."""
    token = block * BLOCK + tl.arange(0, BLOCK)
    x = tl.load(X + token, mask=token < V, other=-float("inf")).to(tl.float32)
    for i in tl.static_range(len(BANNED)):
        x = tl.where(token == BANNED[i], -float("inf"), x)
    return x


@triton.jit
def _draw(weights, uniform, SIZE: tl.constexpr):
    """`decode._draw` of one row. Sums of a scan may fall a little, so that a weight of 0 could be the first above."""
    index = tl.arange(0, SIZE)
    cumulative = tl.where(weights > 0, tl.cumsum(weights, 0), 0.0)
    total = tl.max(cumulative, 0)
    threshold = tl.minimum(uniform * total, total * _BELOW_ONE)
    chosen = tl.min(tl.where(cumulative > threshold, index, SIZE - 1), 0)
    weight = tl.sum(tl.where(index == chosen, weights, 0.0), 0)
    before = tl.sum(tl.where(index == chosen, cumulative, 0.0), 0) - weight
    return chosen, tl.maximum((threshold - before) / weight, 0.0)


# --- kernels ------------------------------------------------------------------------------------------------------


@triton.jit(do_not_specialize=["splits"], do_not_specialize_on_alignment=["SPANS"])
def _attend_kernel(Q, q_stride, K, k_stride, V, v_stride, COS, SIN, KEYS, VALUES, token_stride, head_stride,
                   SPANS, OUT, PARTS, LOG_SUMS, ARRIVED, scale, splits,
                   GROUP: tl.constexpr, PADDED: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)  # neighbours share a prefix, which L2 has
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
    # Peak, sum and weighted values so far: of the new token, or of nothing
    peak = tl.where(
        split == 0, tl.sum(q.to(tl.float32) * k.to(tl.float32)[None, :], 1) * scale, -float("inf")
    )
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
        score = _dot(key, q, tl.zeros((BLOCK, PADDED), tl.float32))
        score = tl.where(inside[:, None], score * scale, -float("inf"))
        new_peak = tl.maximum(peak, tl.max(score, 0))
        p = tl.exp2(score - new_peak[None, :])
        shrink = tl.exp2(peak - new_peak)
        total = total * shrink + tl.sum(p, 0)
        value = tl.load(VALUES + at[None, :] + columns[:, None], mask=inside[None, :], other=0.0)
        out = _dot(value, p.to(dtype), out * shrink[None, :])
        peak = new_peak

    pair = row * tl.num_programs(1) + head
    parts = PARTS + pair * splits * D * PADDED
    log_sums = LOG_SUMS + pair * splits * PADDED
    out = out / tl.where(total == 0, 1.0, total)[None, :]  # a split without a block
    tl.store(parts + split * D * PADDED + columns[:, None] * PADDED + heads[None, :], out)
    tl.store(log_sums + split * PADDED + heads, peak + tl.log2(total))
    tl.debug_barrier()  # all threads have stored before one of them says so
    if tl.atomic_add(ARRIVED + pair, 1, sem="acq_rel", scope="gpu") == splits - 1:
        tl.debug_barrier()
        tl.store(ARRIVED + pair, 0)  # for the next launch
        combined = tl.trans(_combine(parts, log_sums, splits, D, PADDED)).to(dtype)
        out_heads = OUT + (pair * GROUP + heads)[:, None] * D
        tl.store(out_heads + columns[None, :], combined, mask=(heads < GROUP)[:, None])


@triton.jit
def _add_rms_norm_kernel(
    X, x_stride, DELTA, delta_stride, WEIGHT, RESIDUAL, OUT, eps, D, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BLOCK)
    mask = columns < D
    dtype = X.dtype.element_ty
    x = tl.load(X + row * x_stride + columns, mask=mask, other=0.0).to(tl.float32)
    if DELTA is not None:
        residual = x + tl.load(DELTA + row * delta_stride + columns, mask=mask, other=0.0).to(
            tl.float32
        )
        tl.store(RESIDUAL + row * D + columns, residual.to(dtype), mask=mask)
        x = residual.to(dtype).to(tl.float32)
    normed = (x * tl.rsqrt(tl.sum(x * x, 0) / D + eps)).to(dtype).to(tl.float32)
    weight = tl.load(WEIGHT + columns, mask=mask, other=0.0).to(tl.float32)
    tl.store(OUT + row * D + columns, (weight * normed).to(dtype), mask=mask)


@triton.jit
def _silu_mul_kernel(GATE, gate_stride, UP, up_stride, OUT, F, BLOCK: tl.constexpr):
    row = tl.program_id(0).to(tl.int64)
    columns = tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    mask = columns < F
    dtype = GATE.dtype.element_ty
    gate = tl.load(GATE + row * gate_stride + columns, mask=mask, other=0.0).to(tl.float32)
    up = tl.load(UP + row * up_stride + columns, mask=mask, other=0.0).to(tl.float32)
    out = (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32) * up
    tl.store(OUT + row * F + columns, out.to(dtype), mask=mask)


@triton.jit
def _block_sums_kernel(
    X, x_stride, PEAKS, SUMS, scale, V, BANNED: tl.constexpr, BLOCK: tl.constexpr
):
    row = tl.program_id(0).to(tl.int64)
    x = _load_logits(X + row * x_stride, tl.program_id(1), V, BANNED, BLOCK)
    peak = tl.max(x, 0)
    at = row * tl.num_programs(1) + tl.program_id(1)
    tl.store(PEAKS + at, peak)
    tl.store(
        SUMS + at, tl.sum(tl.exp2((x - tl.where(peak == -float("inf"), 0.0, peak)) * scale), 0)
    )


@triton.jit(do_not_specialize_on_alignment=["UNIFORM", "TOKEN", "LOGP"])
def _sample_kernel(X, x_stride, UNIFORM, PEAKS, SUMS, TOKEN, LOGP, scale, V, GREEDY: tl.constexpr,
                   BANNED: tl.constexpr, BLOCK: tl.constexpr, BLOCKS: tl.constexpr, PADDED: tl.constexpr):  # fmt: skip
    row = tl.program_id(0).to(tl.int64)
    block = tl.arange(0, PADDED)
    peaks = tl.load(PEAKS + row * BLOCKS + block, mask=block < BLOCKS, other=-float("inf"))
    sums = tl.load(SUMS + row * BLOCKS + block, mask=block < BLOCKS, other=0.0)
    peak = tl.max(peaks, 0)
    weights = sums * tl.exp2(
        (peaks - peak) * scale
    )  # NaN without a token to draw, and so is the log-probability
    uniform = 0.0 if GREEDY else tl.load(UNIFORM + row)
    block, fraction = _draw(
        tl.where(peaks == peak, 1.0, 0.0) if GREEDY else weights, uniform, PADDED
    )
    x = _load_logits(X + row * x_stride, block, V, BANNED, BLOCK)
    p = tl.exp2((x - tl.max(x, 0)) * scale)
    chosen, _ = _draw(tl.where(x == peak, 1.0, 0.0) if GREEDY else p, fraction, BLOCK)
    y = tl.sum(tl.where(tl.arange(0, BLOCK) == chosen, (x - peak) * scale, 0.0), 0)
    total, top = tl.sum(weights, 0), 0.0
    for i in tl.static_range(
        len(BANNED)
    ):  # they count in the sum of all, and may be far above the rest
        banned_y = (tl.load(X + row * x_stride + BANNED[i]).to(tl.float32) - peak) * scale
        new_top = tl.maximum(top, banned_y)
        total = total * tl.exp2(top - new_top) + tl.exp2(banned_y - new_top)
        top = new_top
    logp = (y - top - tl.log2(total)) * _LN2
    sound = tl.abs(logp) < float("inf")
    tl.store(TOKEN + row, tl.where(sound, block * BLOCK + chosen, -1).to(tl.int64))
    tl.store(LOGP + row, tl.where(sound, logp, float("nan")))


# --- launchers ----------------------------------------------------------------------------------------------------


def attend(
    q, k, v, cos, sin, keys, values, spans, scale: float, splits: int | None = None
) -> torch.Tensor:
    """`decode.attend`. `splits`: programs per row and kv head (None: as many as the GPU runs at once)."""
    (rows, heads, d), kv_heads = q.shape, k.shape[1]
    pairs, group, padded = (
        rows * kv_heads,
        heads // kv_heads,
        max(8, triton.next_power_of_2(heads // kv_heads)),
    )
    if d < 16 or d & (d - 1) or pairs > MAX_PAIRS:
        raise ValueError(
            f"q of shape {tuple(q.shape)}: heads of 16, 32, 64, … channels, or fewer rows, expected"
        )
    inner = [x.stride()[1:] for x in (q, k, v)]
    if inner != [(d, 1)] * 3 or keys.stride(2) != 1 or keys.stride() != values.stride():
        raise ValueError(
            f"strides {inner}, {keys.stride()}, {values.stride()}: dense heads, pools alike expected"
        )
    multiprocessors, arrived = _device(q.device)
    splits = splits or max(1, min(MAX_SPLITS, round(PROGRAMS_PER_SM * multiprocessors / pairs)))
    out = q.new_empty(rows, heads, d)
    parts, log_sums = (
        q.new_empty(pairs, splits, each, padded, dtype=torch.float32) for each in (d, 1)
    )
    _launch(_attend_kernel, (rows, kv_heads, splits), q,
        q, q.stride(0), k, k.stride(0), v, v.stride(0), cos.contiguous(), sin.contiguous(), keys, values,
        keys.stride(0), keys.stride(1), spans.contiguous(), out, parts, log_sums, arrived, scale, splits,
        GROUP=group, PADDED=padded, D=d, BLOCK=BLOCK_BYTES // q.element_size(), num_stages=STAGES,
    )  # fmt: skip
    return out


def add_rms_norm(x, delta, weight, eps: float) -> tuple[torch.Tensor, torch.Tensor]:
    """`decode.add_rms_norm`: a program per row."""
    (rows, d), out = x.shape, x.new_empty(x.shape)
    residual = x if delta is None else x.new_empty(x.shape)
    _launch(_add_rms_norm_kernel, (rows,), x,
        x, x.stride(0), delta, 0 if delta is None else delta.stride(0), weight, residual, out, eps, d,
        BLOCK=triton.next_power_of_2(d), num_warps=8,
    )  # fmt: skip
    return residual, out


def silu_mul(gate, up) -> torch.Tensor:
    """`decode.silu_mul`: programs of 1,024 columns of a row."""
    (rows, f), out = gate.shape, gate.new_empty(gate.shape)
    grid = rows, triton.cdiv(f, GATE_BLOCK)
    _launch(
        _silu_mul_kernel,
        grid,
        gate,
        gate,
        gate.stride(0),
        up,
        up.stride(0),
        out,
        f,
        BLOCK=GATE_BLOCK,
    )
    return out


def sample(
    logits, uniform, temperature: float, banned: tuple[int, ...]
) -> tuple[torch.Tensor, torch.Tensor]:
    """`decode.sample`: peak and sum of each block, then a block and a token in it, which is read again from L2."""
    rows, v = logits.shape
    blocks = triton.cdiv(v, VOCABULARY_BLOCK)
    peaks, sums = (logits.new_empty(rows, blocks, dtype=torch.float32) for _ in range(2))
    token, logp = (
        logits.new_empty(rows, dtype=torch.int64),
        logits.new_empty(rows, dtype=torch.float32),
    )
    x, scale = (logits, logits.stride(0)), 1.4426950408889634 / (temperature or 1.0)
    constants = dict(BANNED=banned, BLOCK=VOCABULARY_BLOCK)
    _launch(_block_sums_kernel, (rows, blocks), logits, *x, peaks, sums, scale, v, **constants)
    _launch(_sample_kernel, (rows,), logits,
        *x, uniform.contiguous(), peaks, sums, token, logp, scale, v, GREEDY=temperature == 0, BLOCKS=blocks,
        PADDED=triton.next_power_of_2(blocks), num_warps=8, **constants,
    )  # fmt: skip
    return token, logp


@lru_cache
def _device(device: torch.device) -> tuple[int, torch.Tensor]:
    """Multiprocessors, and counters of finished programs: 0 between launches, for one stream at a time."""
    if device.type == "cuda" and torch.cuda.is_current_stream_capturing():
        raise RuntimeError("attend must run once on a device before it is captured in a CUDA graph")
    count = (
        torch.cuda.get_device_properties(device).multi_processor_count
        if device.type == "cuda"
        else 1
    )
    return count, torch.zeros(MAX_PAIRS, dtype=torch.int32, device=device)


def _launch(kernel, grid: tuple[int, ...], x: torch.Tensor, *args, **constants) -> None:
    if x.stride(-1) != 1:
        raise ValueError(
            f"strides {x.stride()} of shape {tuple(x.shape)}: adjacent columns expected"
        )
    with torch.cuda.device(x.device) if x.is_cuda else nullcontext():
        kernel[grid](*args, **constants)
