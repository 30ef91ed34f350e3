"""The kernels of a decode step in a graph, and sampling; attention has a file of its own."""

import pytest
import torch
from torch.nn.functional import pad

from mr1_fast.kernels.decode import operations, operations_triton, reference
from mr1_fast.kernels.layers.operations import add_norm, silu_mul

from ..kernels.decode.test_operations import (
    attention_case,
    check_draws,
    logits_case,
    unsound_rows,
)
from .test_decode_attention_triton import SPANS

BLOCK = operations_triton.VOCABULARY_BLOCK


def test_a_graph_holds_the_launches(device):
    if device == "cpu":
        pytest.skip("needs a GPU")
    case = [x.to(device) for x in attention_case(12, 2, 128, SPANS, torch.bfloat16)]
    logits, uniform = (x.to(device) for x in logits_case(7, 10_000, torch.bfloat16))

    def step() -> tuple[torch.Tensor, ...]:
        out = operations.attend(*case, 128**-0.5).flatten(1)
        residual, normed = add_norm(out, out, out[0], None, 1e-6)
        gated = silu_mul(torch.cat([normed, out], dim=1), None)
        return residual, gated, *operations.sample(logits, uniform, 1.0, (3,))

    eager = step()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(3):
        graph.replay()
        torch.testing.assert_close(captured, eager, rtol=0, atol=0)
    case[7][:, 3] -= (case[7][:, 3] > 1).int()  # shorter rows, in the same graph
    graph.replay()
    torch.testing.assert_close(captured, step(), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("v", "dtype"),
    [
        (1, torch.float32),
        (300, torch.bfloat16),
        (BLOCK, torch.float32),
        (BLOCK + 1, torch.bfloat16),
        (3 * BLOCK + 7, torch.bfloat16),
    ],
)
def test_draws_follow_the_inverse_distribution_function(device, v, dtype):
    logits, uniform = logits_case(12, v, dtype)
    for temperature, banned in ((1.0, ()), (1.5, (v // 2 - 1, v // 2)), (0.0, (v - 2,))):
        if v == 1:
            logits, banned = torch.zeros_like(logits), ()
        there = pad(logits, (0, 5), value=99.0).to(device)[:, :v]  # rows that lie apart
        token, logp = operations.sample(there, uniform.to(device), temperature, banned)
        check_draws(logits, uniform, temperature, banned, token, logp)
        theirs = reference.sample_ref(logits, uniform, temperature, banned)
        same = (token.cpu() == theirs[0]).double().mean()
        assert same > 0.8  # the others lie at the bound of two tokens


def test_rows_without_a_sound_distribution_give_no_token(device):
    logits = unsound_rows(2 * BLOCK + 50).to(device)
    for temperature in (1.0, 0.0):
        token, logp = operations.sample(
            logits, torch.rand(len(logits), device=device), temperature, (3, 5)
        )
        assert (token[:5] == -1).all() and logp[:5].isnan().all()
        assert token[5].item() not in (-1, 3, 5) and logp[5].item() == pytest.approx(-300)


def test_greedy_takes_the_first_of_equals(device):
    logits = torch.zeros(2, 2 * BLOCK, device=device)
    logits[0, [5, 70, 75, BLOCK + 1]] = logits[1, [BLOCK + 7, BLOCK + 9]] = 3.0
    token, _ = operations.sample(logits, torch.rand(2, device=device), 0.0, (5,))
    assert token.tolist() == [70, BLOCK + 7]
