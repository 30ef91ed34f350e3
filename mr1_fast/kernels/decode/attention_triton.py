"""Attention of a decode step in Triton: settings, the kernel, its launcher.

`attend` is one launch with programs of two kinds. A prefix program takes the queries of an aligned
block of 8 rows for a kv head, and one split of the prefixes that these rows have; an own program
takes one row and one split of its own tokens. Every program rotates its queries for itself, and the
first one of a row has the new token in registers, so none waits for what another writes to the
pool. The last program of a (row, kv head) to finish combines the row's parts, as in flash-decoding.

Bytes that move, for tokens of 2·Hkv·d values: of the own tokens of each row all, once; of a prefix
all, once for each aligned block of 8 rows in which some row has it. A group of 8 rows that begins
at a multiple of 8 reads its prefix once, one that does not begin there twice; without blocks it
were 8 times. Beside them, each part is written and read once, H·d fp32 values for a row and split.
A single row has no one to share with: its own programs take its prefix, too.

Lengths and numbers of splits are run-time data, and nothing is read on the host, so a CUDA graph
can hold the launch, after a first one outside of it.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..launch import launch
from ..overlap import Overlap, decode_overlap, overlap_options
from ..overlap_triton import let_next_begin, prefetch, wait_for_previous
from ..tuned import tuned
from .attention_spans_triton import (
    LOG_SUM,
    attend_own,
    attend_prefixes,
    combine,
    first_flag,
    own_splits_used,
)


class AttendSetting(NamedTuple):
    """How a launch is cut into programs."""

    block_bytes: int
    """Bytes of one channel in a block of tokens: 128 are 64 tokens of 16 bits."""
    stages: int
    """Blocks of keys and of values that a program has in flight, and works on."""
    programs_per_sm: int
    """Programs for each multiprocessor; where fewer fit at a time, the others wait."""
    prefix_share: int
    """Splits of the prefixes of a block of rows, for each split of a row's own tokens.

    A block's prefixes are longer than a row's own tokens on average, as they are there in full from
    the first step on, and may be several; and what waits for a prefix program is 8 rows.
    """


ATTEND_VARIANTS = tuple(AttendSetting(*fields) for fields in (
    (128, 3, 3, 4),
    (128, 3, 2, 4),
    (128, 3, 3, 2),
    (128, 3, 2, 2),
    (128, 3, 4, 8),
    (128, 2, 3, 4),
    (128, 2, 4, 4),
    (64, 3, 3, 4),
    (64, 3, 4, 4),
    (64, 4, 4, 4),
))  # fmt: skip
"""Settings to try, the default first."""
BLOCK_ROWS = 8
"""Rows of a block that reads its prefixes together."""
MAX_COLUMNS = 64
"""Most queries of a prefix program: four warps of tensor cores take as many, and their outputs are
half of a thread's registers."""
MAX_SPLITS = 16
"""Most programs of each kind for a row and a kv head."""
MAX_PAIRS = 2**16
"""Most pairs of a row and a kv head in a launch."""

# --- device functions ---------------------------------------------------------------------------


@triton.jit
def _parts(SPANS, row, prefix_splits, own_splits, BLOCK: tl.constexpr, SHARED: tl.constexpr):
    """Return the first part of a row, and the number of the one after its last.

    Parts of its prefix come before those of its own tokens. `row` may be a block of rows.
    """
    prefix_len = tl.load(SPANS + row * 4 + 1)
    own_len = tl.load(SPANS + row * 4 + 3)
    if SHARED:
        begin = tl.where(prefix_len > 0, 0, prefix_splits)
    else:
        begin = prefix_len * 0
        own_len += prefix_len
    return begin, prefix_splits + own_splits_used(own_len, own_splits, BLOCK)


# --- kernel -------------------------------------------------------------------------------------


@triton.jit(
    do_not_specialize=["rows", "prefix_splits", "own_splits"],
    do_not_specialize_on_alignment=["SPANS"],
)
def _attend_kernel(
    Q, q_stride, K, k_stride, V, v_stride, COS, SIN, KEYS, VALUES, token_stride, head_stride,
    SPANS, OUT, PARTS, ARRIVED, scale, rows, prefix_splits, own_splits,
    UPCOMING, CHUNKS, COUNT: tl.constexpr, IN_BULK: tl.constexpr, DEPENDENT: tl.constexpr,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    PADDED: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Attend over one split: of the prefixes of ROWS rows first, then of each row's own tokens."""
    let_next_begin(DEPENDENT)
    program = tl.program_id(0)
    prefetch(UPCOMING, CHUNKS, program, tl.num_programs(0), COUNT, IN_BULK)
    wait_for_previous(DEPENDENT)
    SHARED: tl.constexpr = ROWS > 1
    SIZE: tl.constexpr = GROUP * (D + LOG_SUM)  # of a part
    slots = prefix_splits + own_splits
    row_blocks = tl.cdiv(rows, ROWS)
    own_program = program - row_blocks * KV_HEADS * prefix_splits
    if SHARED:
        if own_program < 0:
            first_row = program % row_blocks * ROWS
            head = program // row_blocks % KV_HEADS
            split = program // row_blocks // KV_HEADS
            attend_prefixes(
                Q, q_stride, COS, SIN, KEYS, VALUES, token_stride, head_stride, SPANS,
                PARTS + (head * slots + split) * SIZE, KV_HEADS * slots * GROUP, scale,
                first_row, rows, head, split, prefix_splits, GROUP, D, BLOCK, ROWS, HEADS,
            )  # fmt: skip
            index = tl.arange(0, ROWS)
            row = tl.minimum(first_row + index, rows - 1)
            begin, end = _parts(SPANS, row, prefix_splits, own_splits, BLOCK, SHARED)
            waits = (first_row + index < rows) & (begin == 0)
            tl.debug_barrier()  # all threads have stored their parts before one of them counts
            arrived = tl.atomic_add(
                ARRIVED + row * KV_HEADS + head, 1, mask=waits, sem="acq_rel", scope="gpu"
            )
            complete = waits & (arrived == end - 1)
            i = first_flag(complete, index, -1, ROWS)
            while i < ROWS:
                tl.debug_barrier()
                pair = (first_row + i).to(tl.int64) * KV_HEADS + head
                last = tl.sum(tl.where(index == i, end, 0))
                tl.store(ARRIVED + pair, 0)  # for the next launch
                combine(
                    PARTS + pair * slots * SIZE, OUT + pair * GROUP * D, 0, last,
                    GROUP, PADDED, D,
                )  # fmt: skip
                i = first_flag(complete, index, i, ROWS)
    if own_program >= 0:
        row = (own_program % rows).to(tl.int64)  # neighbours first: they are in the cache together
        head = own_program // rows % KV_HEADS
        split = own_program // rows // KV_HEADS
        begin, end = _parts(SPANS, row, prefix_splits, own_splits, BLOCK, SHARED)
        if split < end - prefix_splits:
            pair = row * KV_HEADS + head
            part = pair * slots + prefix_splits + split
            attend_own(
                Q, q_stride, K, k_stride, V, v_stride, COS, SIN, KEYS, VALUES, token_stride,
                head_stride, SPANS, PARTS + part * SIZE, scale,
                row, head, split, end - prefix_splits, GROUP, PADDED, D, BLOCK, SHARED,
            )  # fmt: skip
            tl.debug_barrier()
            arrived = tl.atomic_add(ARRIVED + pair, 1, sem="acq_rel", scope="gpu")
            if arrived == end - begin - 1:
                tl.debug_barrier()
                tl.store(ARRIVED + pair, 0)
                combine(
                    PARTS + pair * slots * SIZE, OUT + pair * GROUP * D, begin, end,
                    GROUP, PADDED, D,
                )  # fmt: skip


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
    upcoming: Sequence[torch.Tensor] = (),
    overlap: Overlap | None = None,
    setting: AttendSetting | None = None,
) -> torch.Tensor:
    """`operations.attend`.

    overlap, setting: None takes those of the launch table.
    Raises ValueError for heads whose channels are not a power of two from 16 on, for more than
    MAX_PAIRS pairs, and for heads that are not dense.
    """
    (rows, heads, d), kv_heads = q.shape, k.shape[1]
    pairs, group = rows * kv_heads, heads // kv_heads
    _require_dense(q, k, v, keys, values)
    if setting is None:
        setting = tuned("decode_attend", q.device, ATTEND_VARIANTS[0])
    if overlap is None:
        overlap = decode_overlap(q.device)
    multiprocessors, arrived = _device(q.device)

    columns = max(2, triton.next_power_of_2(group))  # tiles have 16 queries or more
    block_rows = min(BLOCK_ROWS, MAX_COLUMNS // columns) if rows > 1 else 1
    block_rows = max(1, block_rows)
    padded = max(8, triton.next_power_of_2(group))
    prefix_splits, own_splits = _splits(
        setting, multiprocessors, kv_heads * triton.cdiv(rows, block_rows), pairs
    )
    if block_rows == 1:
        prefix_splits = 0
    programs = kv_heads * (triton.cdiv(rows, block_rows) * prefix_splits + rows * own_splits)
    out = q.new_empty(rows, heads, d)
    parts = q.new_empty(
        pairs * (prefix_splits + own_splits), group, d + LOG_SUM.value, dtype=torch.float32
    )
    launch(
        _attend_kernel, (programs,), q.device,
        q, q.stride(0), k, k.stride(0), v, v.stride(0), cos.contiguous(), sin.contiguous(),
        keys, values, keys.stride(0), keys.stride(1), spans.contiguous(),
        out, parts, arrived, scale, rows, prefix_splits, own_splits,
        KV_HEADS=kv_heads, GROUP=group, D=d, BLOCK=setting.block_bytes // q.element_size(),
        PADDED=padded, ROWS=block_rows, HEADS=columns, num_stages=setting.stages,
        **overlap_options(overlap, upcoming, q.device),
    )  # fmt: skip
    return out


def _require_dense(q, k, v, keys, values) -> None:
    (rows, _, d), kv_heads = q.shape, k.shape[1]
    if d < 16 or d & (d - 1) or rows * kv_heads > MAX_PAIRS:
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


def _splits(
    setting: AttendSetting, multiprocessors: int, blocks: int, pairs: int
) -> tuple[int, int]:
    """Return the splits of the prefixes of a block of rows, and those of a row's own tokens."""
    shares = setting.prefix_share * blocks + pairs
    own = max(1, round(setting.programs_per_sm * multiprocessors / shares))
    return min(MAX_SPLITS, setting.prefix_share * own), min(MAX_SPLITS, own)


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
