"""The kernels of a decode step against fp64, with errors bounded by those of PyTorch."""

import pytest
import torch
from torch.nn.functional import pad, silu

from mr1_fast.kernels.decode import attention_triton, operations, operations_triton, reference

from ..kernels.decode.test_operations import (
    attention_case,
    check_draws,
    check_error,
    logits_case,
    plain_attention,
    unsound_rows,
)

BLOCK = operations_triton.VOCABULARY_BLOCK
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


def attended(case: list, device: str, splits: int | None = None) -> tuple[torch.Tensor, ...]:
    """Return the output, and the keys and values afterwards."""
    pool = torch.stack(case[5:7], dim=1).to(device)
    arguments = [x.to(device) for x in case[:5]]
    arguments[:3] = torch.cat(arguments[:3], dim=1).split(
        [x.shape[1] for x in arguments[:3]], dim=1
    )
    spans = case[7].to(device)
    out = attention_triton.attend(
        *arguments, pool[:, 0], pool[:, 1], spans, case[0].shape[2] ** -0.5, splits
    )
    _, counters = attention_triton._device(out.device)
    assert not counters.any(), "counters must be 0 for the next launch"
    return out.cpu(), *pool.cpu().unbind(1)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "d", "dtype", "splits"),
    [
        (12, 2, 128, torch.bfloat16, 3),
        (12, 2, 128, torch.float32, None),
        (7, 1, 128, torch.bfloat16, 2),
        (7, 1, 16, torch.float32, 3),
        (2, 2, 16, torch.bfloat16, 1),
        (9, 1, 32, torch.float16, 5),
    ],
)
def test_attention(device, heads, kv_heads, d, dtype, splits):
    case = attention_case(heads, kv_heads, d, SPANS, dtype)
    exact = plain_attention(*[x.double() for x in case[:7]], case[7], d**-0.5)
    theirs = plain_attention(*case, d**-0.5)
    out, keys, values = attended(case, device, splits)
    assert out.dtype == dtype and out.shape == theirs.shape
    check_error(out, theirs, exact)
    reference.attend_ref(*case, d**-0.5)  # writes its own pool
    if device == "cuda":
        # The compiler may fuse a product of the rotation into its sum: a unit in the last place.
        close = dict(rtol=torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps)
    elif dtype == torch.float32:
        close = dict(rtol=1e-6, atol=1e-6)
    else:
        close = dict(rtol=0, atol=0)
    torch.testing.assert_close(keys, case[5], equal_nan=True, **close)
    torch.testing.assert_close(values, case[6], equal_nan=True, rtol=0, atol=0)


def test_the_order_of_programs_does_not_matter(device, reverse_grid):
    case = attention_case(4, 2, 16, SPANS[:3], torch.float32)
    forwards = attended(case, device, 3)
    reverse_grid()
    for ours, theirs in zip(attended(case, device, 3), forwards, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0, equal_nan=True)


def test_a_graph_holds_the_launches(device):
    if device == "cpu":
        pytest.skip("needs a GPU")
    case = [x.to(device) for x in attention_case(12, 2, 128, SPANS, torch.bfloat16)]
    logits, uniform = (x.to(device) for x in logits_case(7, 10_000, torch.bfloat16))

    def step() -> tuple[torch.Tensor, ...]:
        out = operations.attend(*case, 128**-0.5).flatten(1)
        residual, normed = operations.add_rms_norm(out, out, out[0], 1e-6)
        return (
            residual,
            operations.silu_mul(normed, out),
            *operations.sample(logits, uniform, 1.0, (3,)),
        )

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


def test_what_attention_cannot_take_is_told(device):
    case = attention_case(2, 1, 24, SPANS[:1], torch.float32)
    with pytest.raises(ValueError, match="heads of 16, 32, 64"):
        attended(case, device)
    case = [x.to(device) for x in attention_case(2, 2, 16, SPANS[:1], torch.float32)]
    case[0] = case[0].mT.contiguous().mT
    with pytest.raises(ValueError, match="dense heads"):
        attention_triton.attend(*case, 0.25)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("width", [96, 1025])
def test_norm_and_gate(device, dtype, width):
    generator = torch.Generator().manual_seed(width)
    both = torch.randn(3, 2 * width, generator=generator).to(dtype)  # rows that lie apart
    weight = torch.randn(width, generator=generator).to(dtype)
    x, delta = both.chunk(2, dim=1)
    there = both.to(device).chunk(2, dim=1)

    exact = silu(x.double()) * delta.double()
    check_error(operations.silu_mul(*there), silu(x) * delta, exact)
    for update, update_there in ((delta, there[1]), (None, None)):
        residual, normed = operations.add_rms_norm(there[0], update_there, weight.to(device), 1e-6)
        theirs = reference.add_rms_norm_ref(x, update, weight, 1e-6)
        exact = reference.add_rms_norm_ref(theirs[0].double(), None, weight.double(), 1e-6)[1]
        assert torch.equal(residual.cpu(), theirs[0])
        check_error(normed, theirs[1], exact)


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
