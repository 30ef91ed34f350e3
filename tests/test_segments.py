"""Gathered keys, and rectangles of padded ones, show each token what a dense mask shows."""

from itertools import pairwise

import pytest
import torch

from mr1_fast.segments import Gather

from .data.segments import SHAPES, segments_of


def test_gather_is_index_select_with_its_gradient():
    rows, x = (
        torch.tensor([4, 0, 4, 4, 2]),
        torch.randn(6, 3, 2, dtype=torch.float64, requires_grad=True),
    )
    gather = Gather(rows, 6)
    assert torch.equal(gather(x), x[rows])
    torch.autograd.gradcheck(gather, (x,))
    incoming = torch.randn(5, 3, 2, dtype=torch.float64)
    expected = torch.autograd.grad(x[rows], x, incoming)
    torch.testing.assert_close(torch.autograd.grad(gather(x), x, incoming), expected)


def test_gather_sums_bf16_gradients_in_fp32():
    """Each of 64 completions takes its prompt's keys, and 64 additions in bf16 would lose bits.

    torch's index_select sums as well on a CPU, but by atomic additions in bf16 on a GPU.
    """
    generator = torch.Generator().manual_seed(0)
    rows = torch.cat([torch.arange(20)] * 64)
    incoming = torch.randn(len(rows), 2, 32, generator=generator).bfloat16()
    exact = incoming.double().view(64, 20, 2, 32).sum(0)

    def error(take) -> torch.Tensor:
        x = torch.zeros(20, 2, 32, dtype=torch.bfloat16, requires_grad=True)
        return (torch.autograd.grad(take(x), x, incoming)[0].double() - exact).abs()

    ours, theirs = error(Gather(rows, 20)), error(lambda x: x.index_select(0, rows))
    assert (ours <= 2**-8 * exact.abs()).all(), "one rounding to bf16, of the sum"
    assert ours.max() <= theirs.max()


@pytest.mark.parametrize("groups", SHAPES.values(), ids=SHAPES)
def test_rectangles_show_what_a_dense_mask_shows(groups):
    segments, expected = segments_of(groups)
    slots = []  # of each padded query: the packed token that it holds, and the tokens that it sees
    for rectangle in segments.padded.rectangles:
        count, length_q, length_k = rectangle.shape
        visible = rectangle.visible
        if visible is None:
            visible = (
                torch.ones(length_q, length_k, dtype=torch.bool).tril().expand(count, 1, -1, -1)
            )
        queries, keys = (
            rectangle.queries.rows.view(count, length_q),
            rectangle.keys.rows.view(count, length_k),
        )
        slots += [
            (queries[s, q].item(), keys[s][visible[s, 0, q]].tolist())
            for s in range(count)
            for q in range(length_q)
        ]
        added = rectangle.mask(torch.float64)
        assert added is None or (
            torch.equal(added == 0, visible) and torch.equal(added == -torch.inf, ~visible)
        )
    for token, slot in enumerate(segments.padded.unpad.rows.tolist()):
        holds, sees = slots[slot]
        assert holds == token
        assert sorted(sees) == expected[token].nonzero().flatten().tolist(), f"token {token}"
    assert token + 1 == len(expected)


@pytest.mark.parametrize("groups", SHAPES.values(), ids=SHAPES)
def test_segments_aligned_at_the_end_show_what_a_dense_mask_shows(groups):
    """What a variable-length function makes of cu_seqlens and gathered keys, token by token."""
    segments, expected = segments_of(groups)
    bounds_q, bounds_k = segments.cu_seqlens_q.tolist(), segments.cu_seqlens_k.tolist()
    assert bounds_q[-1] == len(expected) and bounds_k[-1] == len(segments.key_rows)
    for a, (start, stop) in enumerate(pairwise(bounds_q)):
        keys = segments.key_rows[bounds_k[a] : bounds_k[a + 1]].tolist()
        for token in range(start, stop):
            sees = keys[: len(keys) - (stop - token - 1)]
            assert sorted(sees) == expected[token].nonzero().flatten().tolist(), f"token {token}"
    assert (
        segments.max_q == segments.cu_seqlens_q.diff().max()
        and segments.max_k == segments.cu_seqlens_k.diff().max()
    )
