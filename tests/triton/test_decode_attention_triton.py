"""Attention of a decode step against fp64, with errors bounded by those of PyTorch."""

import pytest
import torch

from mr1_fast.kernels.decode import (
    attention_spans_triton,
    attention_triton,
    operations,
    reference,
)
from mr1_fast.kernels.decode.attention_triton import AttendSetting
from mr1_fast.kernels.decode.dot_triton import dot
from mr1_fast.kernels.layers.reference import norm_ref
from mr1_fast.kernels.overlap import Overlap

from ..data.decode import exactly_normed, head_norms
from ..kernels.decode.test_operations import attention_case, check_error, plain_attention

# Blocks of 64 tokens for 16 bits, and 32 of a prefix, which may be a split; for 32 bits half of it
SETTING = AttendSetting(128, 64, 1, 3, 3, 0.5)
# Two rows that share a prefix; the new token alone; own tokens alone, which end with a block and
# beside one; prefixes that end with a block and inside one
SPANS = [
    [0, 70, 300, 1],
    [0, 70, 301, 66],
    [7, 0, 400, 1],
    [7, 0, 401, 65],
    [7, 0, 470, 64],
    [70, 64, 600, 2],
    [134, 31, 610, 3],
]


def grouped(*groups: tuple[int, int]) -> list[list[int]]:
    """Return the spans of groups of rows: (rows, tokens of the prefix they share), side by side.

    Their own tokens are 1, 2, … 5, then 1 again.
    """
    spans, prefix_start = [], 0
    own_start = sum(prefix_len for _, prefix_len in groups)
    for rows, prefix_len in groups:
        for _ in range(rows):
            own_len = 1 + len(spans) % 5
            spans.append([prefix_start, prefix_len, own_start, own_len])
            own_start += own_len
        prefix_start += prefix_len
    return spans


def without_sample(spans: list[list[int]], *rows: int) -> list[list[int]]:
    """Take the samples of some rows away: these have one token of their own and no prefix."""
    return [[0, 0, own, 1] if i in rows else [start, length, own, own_len]
            for i, (start, length, own, own_len) in enumerate(spans)]  # fmt: skip


def interleaved(spans: list[list[int]]) -> list[list[int]]:
    """Put the rows of the second half between those of the first."""
    half = (len(spans) + 1) // 2
    return [spans[i // 2 + (i % 2) * half] for i in range(len(spans))]


MIXED = {
    "one row": SPANS[1:2],
    "two rows": grouped((2, 40)),
    "a row beside a pair": grouped((1, 33), (2, 64)),
    "seven": grouped((7, 65)),
    "eight": grouped((8, 96)),
    "nine": grouped((9, 32)),
    "sixteen": grouped((16, 31)),
    "groups that meet in a block": grouped((3, 40), (6, 64), (1, 1), (1, 33)),
    "rows apart with one prefix": interleaved(grouped((5, 64), (5, 40))),
    "rows without a sample between": without_sample(grouped((8, 70), (4, 33)), 0, 3, 9),
    "a prefix for each row": grouped(*[(1, 20 + 9 * i) for i in range(9)]),
    "no prefix": grouped((9, 0)),
    "long own tokens": SPANS,
}


@pytest.fixture(autouse=True)
def shared_in_every_dtype(device, monkeypatch):
    """Let fp32 take the way of the other dtypes, where no registers limit it."""
    if device == "cpu":
        monkeypatch.setattr(
            attention_triton,
            "SHARING_DTYPES",
            (torch.float32, *attention_triton.SHARING_DTYPES),
        )


@pytest.fixture
def splits(monkeypatch):
    """Return a function that fixes the splits of prefixes, where rows share, and of own tokens."""

    def fix(prefix: int, own: int) -> None:
        def fixed(programs, share, rows, block_rows) -> tuple[int, int]:
            return (max(prefix, block_rows) if block_rows > 1 else 0), own

        monkeypatch.setattr(attention_triton, "_splits", fixed)

    return fix


def attended(case: list, device: str, norms=None, **arguments) -> tuple[torch.Tensor, ...]:
    """Return the output, and the keys and values afterwards."""
    pool = torch.stack(case[5:7], dim=1).to(device)
    rotated = [x.to(device) for x in case[:5]]
    rotated[:3] = torch.cat(rotated[:3], dim=1).split([x.shape[1] for x in rotated[:3]], dim=1)
    spans, scale = case[7].to(device), case[0].shape[2] ** -0.5
    if norms is not None:
        norms = norms._replace(q=norms.q.to(device), k=norms.k.to(device))
    out = attention_triton.attend(*rotated, *pool.unbind(1), spans, scale, norms, **arguments)
    _, counters = attention_triton._device(out.device)
    assert not counters.any(), "counters must be 0 for the next launch"
    return out.cpu(), *pool.cpu().unbind(1)


def check(case: list, device: str, norms=None, **arguments) -> None:
    """Compare with fp64: no row may read beyond its spans, where the pool is NaN."""
    dtype, d = case[0].dtype, case[0].shape[2]
    exact, eager = [x.double() for x in case[:7]], [*case]
    if norms is not None:
        exact[:2] = exactly_normed(*case[:2], norms)
        eager[:2] = [
            norm_ref(x, weight, None, norms.eps)
            for x, weight in ((case[0], norms.q), (case[1], norms.k))
        ]
    exact = plain_attention(*exact, case[7], d**-0.5)
    theirs = plain_attention(*eager, d**-0.5)
    out, keys, values = attended(case, device, norms, **arguments)
    assert out.dtype == dtype and out.shape == theirs.shape
    check_error(out, theirs, exact)
    reference.attend_ref(*case, d**-0.5, norms)  # writes its own pool
    if device == "cuda" or (norms is not None and dtype != torch.float32):
        # The compiler may fuse a product of the rotation into its sum, and the sum of a norm's
        # squares has another order: a unit in the last place.
        close = dict(rtol=torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
    elif dtype == torch.float32:
        close = dict(rtol=1e-6, atol=1e-6)
    else:
        close = dict(rtol=0, atol=0)
    torch.testing.assert_close(keys, case[5], equal_nan=True, **close)
    torch.testing.assert_close(values, case[6], equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "dtype", "prefix", "own"),
    [
        (12, 2, 128, torch.bfloat16, 8, 3),
        (6, 1, 128, torch.float32, 16, 1),
        (14, 2, 32, torch.bfloat16, 9, 2),
        (8, 1, 16, torch.float32, 8, 3),
        (2, 2, 16, torch.bfloat16, 8, 1),
        (9, 1, 32, torch.float16, 11, 5),
    ],
)
def test_attention(device, splits, heads, kv_heads, d, dtype, prefix, own):
    splits(prefix, own)
    check(attention_case(heads, kv_heads, d, SPANS, dtype), device, setting=SETTING)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "dtype", "name"),
    [
        (2, 1, 128, torch.bfloat16, "a row beside a pair"),
        (4, 1, 64, torch.float32, "a row beside a pair"),
        (8, 2, 32, torch.float16, "one row"),
    ],
)
def test_heads_are_normed_before_the_rotation(device, splits, heads, kv_heads, d, dtype, name):
    splits(8, 2)
    case = attention_case(heads, kv_heads, d, MIXED[name], dtype)
    check(case, device, head_norms(d, dtype), setting=SETTING)


@pytest.mark.parametrize("name", MIXED)
def test_rows_that_share_prefixes(device, splits, name):
    splits(10, 2)
    dtype = torch.float32 if device == "cpu" else torch.float16
    check(attention_case(6, 1, 16, MIXED[name], dtype), device, setting=SETTING)


@pytest.mark.parametrize("blocks", {setting[:3] for setting in attention_triton.ATTEND_VARIANTS})
def test_every_size_of_blocks(device, blocks):
    case = attention_case(7, 1, 16, MIXED["a row beside a pair"], torch.float16)
    check(case, device, setting=AttendSetting(*blocks, 3, 3, 0.5))


def test_a_row_does_not_depend_on_its_neighbours(device):
    """Alone, a row has its own way; beside others, NaN and infinity of theirs stay with them."""
    spans = MIXED["groups that meet in a block"]
    case = attention_case(6, 1, 16, spans, torch.float32)
    together, *_ = attended(case, device, setting=SETTING)
    for row in (0, 4, 10):
        alone = [x[row : row + 1] if i not in (5, 6) else x for i, x in enumerate(case)]
        out, *_ = attended(alone, device, setting=SETTING)
        torch.testing.assert_close(out[0], together[row], rtol=2e-6, atol=2e-6)

    keys, values = case[5:7]
    keys[50], values[60] = torch.nan, torch.inf  # in the second group's prefix
    beside, *_ = attended(case, device, setting=SETTING)
    second = torch.tensor([start == 40 for start, *_ in spans])
    assert torch.equal(beside[~second], together[~second])
    assert not beside[second].isfinite().any()


def test_a_shared_prefix_is_read_once_for_eight_rows(device, splits, monkeypatch):
    """Count the products of 64 queries with a block of a prefix's keys."""
    if device == "cuda":
        pytest.skip("counts what the interpreter calls")
    splits(8, 1)
    counted = []

    def counting(a, b, accumulator):
        counted.append(tuple(accumulator.shape) == (64, 32))
        return dot(a, b, accumulator)

    monkeypatch.setattr(attention_spans_triton, "dot", counting)
    setting = SETTING._replace(prefix_block_bytes=128)
    # Tokens / 32, for each block of rows: of 8; of 8 and 1; of 8 and 2, which have two prefixes
    for name, blocks in (("eight", 3), ("nine", 1 + 1), ("rows apart with one prefix", 4 + 4)):
        counted.clear()
        attended(attention_case(5, 1, 16, MIXED[name], torch.float32), device, setting=setting)
        assert sum(counted) == blocks, name


@pytest.mark.parametrize("name", ["a row beside a pair", "one row"])
def test_the_order_of_programs_does_not_matter(device, splits, reverse_grid, name):
    splits(8, 3)
    case = attention_case(4, 2, 16, MIXED[name], torch.float32)
    forwards = attended(case, device)
    reverse_grid()
    for ours, theirs in zip(attended(case, device), forwards, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_weights_that_come_next_do_not_change_the_result(device):
    case = attention_case(6, 1, 16, MIXED["eight"], torch.float16)
    plain, *_ = attended(case, device)
    weight = torch.zeros(300, 40, dtype=torch.float16, device=device)
    early = device == "cuda" and torch.cuda.get_device_capability() >= (9, 0)
    out, *_ = attended(case, device, upcoming=(weight,), overlap=Overlap(early, 16))
    assert torch.equal(out, plain)
    there = [x.to(device) for x in case]
    assert torch.equal(operations.attend(*there, 0.25, upcoming=(weight,)).cpu(), plain)


def test_splits_fill_the_gpu():
    for rows, programs in ((1, 198.0), (2, 198.0), (8, 198.0), (64, 198.0), (64, 99.0), (512, 9.0)):
        block_rows = 8 if rows > 1 else 1
        blocks = -(-rows // block_rows)
        prefix, own = attention_triton._splits(programs, 0.25, rows, block_rows)
        assert 1 <= own <= 16 and (prefix == 0 if rows == 1 else 8 <= prefix <= 16)
        assert prefix * blocks + own * rows <= max(1.25 * programs, 8 * blocks + rows)


def test_what_attention_cannot_take_is_told(device):
    case = attention_case(2, 1, 24, SPANS[:1], torch.float32)
    with pytest.raises(ValueError, match="heads of 16, 32, 64"):
        attended(case, device)
    case = attention_case(2, 1, 16, SPANS[:1], torch.float32)
    with pytest.raises(ValueError, match="is not a dense one of 16 channels"):
        attended(case, device, head_norms(32))
    case = [x.to(device) for x in attention_case(2, 2, 16, SPANS[:1], torch.float32)]
    case[0] = case[0].mT.contiguous().mT
    with pytest.raises(ValueError, match="dense heads"):
        attention_triton.attend(*case, 0.25)
