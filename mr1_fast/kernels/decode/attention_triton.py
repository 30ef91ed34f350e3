"""Attention of a decode step in Triton: settings, the kernel, its launcher.

`attend` is one launch with programs of two kinds. A prefix program takes the queries of an aligned
block of 8 rows for a kv head, and one split of the prefixes that these rows have; an own program
takes one row and one split of its own tokens. Every program norms and rotates its queries for
itself, and the first one of a row has the new token in registers, so none waits for what another
writes to the pool. The last program of a (row, kv head) to finish combines the row's parts, as in
flash-decoding.

Bytes that move, 2·Hkv·d values a token: the own tokens of every row once, and a prefix once for
each aligned block of 8 rows in which some row has it, wherever in the block these rows are. 64 rows
of Qwen2-VL 2B in groups of 8, with 400 tokens of prefix and 128 of their own, read 3.3 and 8.4 MB;
26 MB of prefixes if each row read its own. A part, H·(d + 4) fp32 values of a row, is written and
read once: here 1.6 MB in 4 parts of prefixes and 0.8 in 2 of own tokens, which stay in L2. A single
row has no one to share with: its own programs take its prefix, too.

Lengths and numbers of splits are run-time data, and nothing is read on the host, so a CUDA graph
can hold the launch, after a first one outside of it.
"""

from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import torch
import triton
import triton.language as tl

from ..launch import launch, most_registers
from ..layers.head_norms import HeadNorms
from ..overlap import Overlap, decode_overlap, overlap_options
from ..overlap_triton import let_next_begin, prefetch, wait_for_previous
from ..tuned import tuned
from .attention_spans_triton import (
    attend_own,
    attend_prefix,
    combine,
    own_parts,
    prefix_parts,
)


class AttendSetting(NamedTuple):
    """How a launch is cut into programs."""

    block_bytes: int
    """Bytes of one channel in a block of a row's own tokens: 128 are 64 tokens of 16 bits."""
    prefix_block_bytes: int
    """The same, of a prefix."""
    split_blocks: int
    """Fewest blocks of a prefix for a program, on average: its outputs are 8 rows', so that a split
    of few tokens would write more than it reads."""
    stages: int
    """Blocks of keys and of values that a program has in flight, and works on."""
    programs_per_sm: int
    """Programs for each multiprocessor; where fewer fit at a time, the others wait."""
    prefix_share: float
    """Which of the programs read prefixes, as a fraction; the others read own tokens."""


ATTEND_VARIANTS = tuple(AttendSetting(*fields) for fields in (
    (128, 64, 4, 3, 3, 0.25),
    (128, 64, 4, 3, 3, 0.5),
    (128, 64, 2, 3, 3, 0.5),
    (128, 64, 8, 3, 3, 0.25),
    (128, 64, 4, 3, 4, 0.25),
    (128, 64, 4, 2, 4, 0.25),
    (128, 128, 2, 2, 2, 0.25),
    (128, 128, 2, 3, 2, 0.25),
    (64, 64, 4, 3, 3, 0.25),
    (64, 64, 4, 4, 3, 0.25),
    (64, 64, 4, 3, 4, 0.25),
))  # fmt: skip
"""Settings to try, the default first: of it an H100's multiprocessor holds three programs."""
SHARING_DTYPES = torch.bfloat16, torch.float16
"""Dtypes of which a block of rows reads its prefixes together. Products in fp32 do not run on
tensor cores, and a thread would need thousands of registers for those of 64 queries."""
BLOCK_ROWS = 8
"""Rows of a block that reads its prefixes together."""
MAX_COLUMNS = 64
"""Most queries of a prefix program: four warps of tensor cores take as many, and their outputs are
half of a thread's registers."""
REGISTERS_OF_32 = 168
"""The most registers of a thread in a prefix program of 32 queries. On an H100 three programs then
fill the registers of a multiprocessor; left alone, the compiler takes 128 and spills some."""
MAX_SPLITS = 16
"""Most programs of each kind for a row and a kv head."""
NO_NORMS = None, None, 0.0
"""Arguments of the kernel in place of the norms, where there are none."""
MAX_PAIRS = 2**16
"""Most pairs of a row and a kv head in a launch."""

# --- device functions ---------------------------------------------------------------------------


@triton.jit
def _prefix_program(
    program, Q, q_stride, Q_NORM, eps, COS, SIN, KEYS, VALUES, token_stride, head_stride,
    SPANS, OUT, PARTS, ARRIVED, scale, rows, prefix_splits, own_splits,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    SPLIT: tl.constexpr, OWN_BLOCK: tl.constexpr,
    PADDED: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Read one split of a prefix for all rows of a block that have it."""
    row_blocks = tl.cdiv(rows, ROWS)
    first_row = program % row_blocks * ROWS
    head = program // row_blocks % KV_HEADS
    number, parts, count = prefix_parts(SPANS, first_row, rows, prefix_splits, SPLIT, ROWS)
    number_here = program // row_blocks // KV_HEADS % count
    split = program // row_blocks // KV_HEADS // count
    index = tl.arange(0, ROWS)
    has_it = number == number_here
    leader = tl.min(tl.where(has_it, index, ROWS))
    splits = tl.sum(tl.where(index == leader, parts, 0))
    if split < splits:
        size = (prefix_splits + own_splits) * GROUP
        attend_prefix(
            Q, q_stride, Q_NORM, eps, COS, SIN, KEYS, VALUES, token_stride, head_stride,
            SPANS, PARTS, size, scale, first_row, leader, rows, head, split, splits, own_splits,
            KV_HEADS, GROUP, D, BLOCK, OWN_BLOCK, ROWS, HEADS,
        )  # fmt: skip
        has_it &= first_row + index < rows
        own_len = tl.load(SPANS + (first_row + index) * 4 + 3, mask=has_it, other=1)
        parts += own_parts(own_len, own_splits, OWN_BLOCK)
        arrived = ARRIVED + (first_row + index) * KV_HEADS + head
        tl.debug_barrier()  # all threads have stored their parts before one of them counts
        before = tl.atomic_add(arrived, 1, mask=has_it, sem="acq_rel", scope="gpu")
        complete = has_it & (before == parts - 1)
        i = tl.min(tl.where(complete, index, ROWS))
        while i < ROWS:
            tl.debug_barrier()
            pair = (first_row + i).to(tl.int64) * KV_HEADS + head
            parts_of_row = tl.sum(tl.where(index == i, parts, 0))
            combine(PARTS, OUT, ARRIVED, pair, size, parts_of_row, GROUP, PADDED, D)
            i = tl.min(tl.where(complete & (index > i), index, ROWS))


@triton.jit
def _own_program(
    program, Q, q_stride, K, k_stride, V, v_stride, Q_NORM, K_NORM, eps, COS, SIN,
    KEYS, VALUES, token_stride, head_stride,
    SPANS, OUT, PARTS, ARRIVED, scale, rows, prefix_splits, own_splits,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr, BLOCK: tl.constexpr,
    SPLIT: tl.constexpr, PADDED: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Read one split of a row's own tokens; of its prefix, too, if ROWS is 1."""
    row = (program % rows).to(tl.int64)  # neighbours first: if they share a prefix, L2 has it
    head = program // rows % KV_HEADS
    split = program // rows // KV_HEADS
    length = tl.load(SPANS + row * 4 + 3)
    if ROWS == 1:
        length += tl.load(SPANS + row * 4 + 1)
    splits = own_parts(length, own_splits, BLOCK)
    if split < splits:
        parts = splits
        if ROWS > 1:
            first_row = row // ROWS * ROWS
            _, shared, _ = prefix_parts(SPANS, first_row, rows, prefix_splits, SPLIT, ROWS)
            parts += tl.sum(tl.where(tl.arange(0, ROWS) == row % ROWS, shared, 0))
        pair = row * KV_HEADS + head
        size = (prefix_splits + own_splits) * GROUP
        attend_own(
            Q, q_stride, K, k_stride, V, v_stride, Q_NORM, K_NORM, eps, COS, SIN,
            KEYS, VALUES, token_stride, head_stride, SPANS, PARTS, pair * size,
            scale, row, head, split, splits, GROUP, PADDED, D, BLOCK, ROWS > 1,
        )  # fmt: skip
        tl.debug_barrier()
        if tl.atomic_add(ARRIVED + pair, 1, sem="acq_rel", scope="gpu") == parts - 1:
            tl.debug_barrier()
            combine(PARTS, OUT, ARRIVED, pair, size, parts, GROUP, PADDED, D)


# --- kernel -------------------------------------------------------------------------------------


@triton.jit(
    do_not_specialize=["rows", "prefix_splits", "own_splits"],
    do_not_specialize_on_alignment=["SPANS"],
)
def _attend_kernel(
    Q, q_stride, K, k_stride, V, v_stride, Q_NORM, K_NORM, eps, COS, SIN,
    KEYS, VALUES, token_stride, head_stride,
    SPANS, OUT, PARTS, ARRIVED, scale, rows, prefix_splits, own_splits,
    UPCOMING, CHUNKS, COUNT: tl.constexpr, IN_BULK: tl.constexpr, LANES: tl.constexpr,
    DEPENDENT: tl.constexpr,
    KV_HEADS: tl.constexpr, GROUP: tl.constexpr, D: tl.constexpr,
    BLOCK: tl.constexpr, PREFIX_BLOCK: tl.constexpr, SPLIT: tl.constexpr,
    PADDED: tl.constexpr, ROWS: tl.constexpr, HEADS: tl.constexpr,
):  # fmt: skip
    """Attend over one split: of the prefixes of ROWS rows first, then of each row's own tokens."""
    let_next_begin(DEPENDENT)
    program = tl.program_id(0)
    prefetch(UPCOMING, CHUNKS, program, tl.num_programs(0), COUNT, IN_BULK, LANES)
    wait_for_previous(DEPENDENT)
    own_program = program - tl.cdiv(rows, ROWS) * KV_HEADS * prefix_splits
    if ROWS > 1 and own_program < 0:
        _prefix_program(
            program, Q, q_stride, Q_NORM, eps, COS, SIN, KEYS, VALUES, token_stride, head_stride,
            SPANS, OUT, PARTS, ARRIVED, scale, rows, prefix_splits, own_splits,
            KV_HEADS, GROUP, D, PREFIX_BLOCK, SPLIT, BLOCK, PADDED, ROWS, HEADS,
        )  # fmt: skip
    if own_program >= 0:
        _own_program(
            own_program, Q, q_stride, K, k_stride, V, v_stride, Q_NORM, K_NORM, eps, COS, SIN,
            KEYS, VALUES, token_stride, head_stride,
            SPANS, OUT, PARTS, ARRIVED, scale, rows, prefix_splits, own_splits,
            KV_HEADS, GROUP, D, BLOCK, SPLIT, PADDED, ROWS,
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
    norms: HeadNorms | None = None,
    upcoming: Sequence[torch.Tensor] = (),
    overlap: Overlap | None = None,
    setting: AttendSetting | None = None,
) -> torch.Tensor:
    """`operations.attend`.

    overlap, setting: None takes those of the launch table.
    Raises ValueError for heads whose channels are not a power of two from 16 on, for more than
    MAX_PAIRS pairs, for heads that are not dense, and for norms that do not fit them.
    """
    (rows, heads, d), kv_heads = q.shape, k.shape[1]
    group = heads // kv_heads
    _require_dense(q, k, v, keys, values)
    if norms is not None:
        norms.require_fitting(d)
    if setting is None:
        setting = tuned("decode_attend", q.device, ATTEND_VARIANTS[0])
    if overlap is None:
        overlap = decode_overlap(q.device)
    multiprocessors, arrived = _device(q.device)

    columns = max(2, triton.next_power_of_2(group))  # tensor cores take 16 queries or more
    shares = rows > 1 and q.dtype in SHARING_DTYPES
    block_rows = max(1, min(BLOCK_ROWS, MAX_COLUMNS // columns)) if shares else 1
    row_blocks = triton.cdiv(rows, block_rows)
    wanted = setting.programs_per_sm * multiprocessors / kv_heads
    prefix_splits, own_splits = _splits(wanted, setting.prefix_share, rows, block_rows)
    programs = kv_heads * (row_blocks * prefix_splits + rows * own_splits)
    out = q.new_empty(rows, heads, d)
    # Outputs, the logarithm of the sum of their weights, and what makes rows multiples of 16 bytes
    part = group, d + 4
    splits = prefix_splits + own_splits
    parts = q.new_empty(rows, kv_heads, splits, *part, dtype=torch.float32)
    limit = most_registers(REGISTERS_OF_32) if block_rows * columns == 32 else {}
    block = setting.block_bytes // q.element_size()
    prefix_block = setting.prefix_block_bytes // q.element_size()
    launch(
        _attend_kernel, (programs,), q.device,
        q, q.stride(0), k, k.stride(0), v, v.stride(0),
        *(norms or NO_NORMS), cos.contiguous(), sin.contiguous(),
        keys, values, keys.stride(0), keys.stride(1), spans.contiguous(),
        out, parts, arrived, scale, rows, prefix_splits, own_splits,
        KV_HEADS=kv_heads, GROUP=group, D=d,
        BLOCK=block, PREFIX_BLOCK=prefix_block, SPLIT=prefix_block * setting.split_blocks,
        PADDED=max(8, triton.next_power_of_2(group)), ROWS=block_rows, HEADS=columns,
        num_stages=setting.stages, **limit,
        **overlap_options(overlap, upcoming, q.device, programs),
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


def _splits(programs: float, share: float, rows: int, block_rows: int) -> tuple[int, int]:
    """Return the splits of a block's prefixes and of a row's own tokens, for `programs` a kv head.

    A block has a split for each of its rows at least, as each may have another prefix.
    """
    blocks, prefix = -(-rows // block_rows), 0
    if block_rows > 1:
        prefix = max(block_rows, min(MAX_SPLITS, round(share * programs / blocks)))
    own = round((programs - prefix * blocks) / rows)
    return prefix, max(1, min(MAX_SPLITS, own))


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
