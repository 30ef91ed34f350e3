"""A decode step's operations on a CPU, against plain fp64, transformers and statistics."""

import math

import pytest
import torch
from torch.nn import functional as F
from transformers.models.qwen2.modeling_qwen2 import apply_rotary_pos_emb
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from mr1_fast.kernels.decode import attention_native, operations, reference
from mr1_fast.kernels.decode.operations import attend
from mr1_fast.kernels.decode.reference import attend_ref, sample_ref

from ...data.decode import exactly_normed, head_norms

SIX_SIGMA = 6.0
LARGEST_UNIFORM = 1 - 2**-24


def check_error(ours: torch.Tensor, theirs: torch.Tensor, exact: torch.Tensor) -> None:
    """Assert that our error is at most twice PyTorch's in the same dtype, and some roundings."""
    error, allowed = ((x.cpu().double() - exact).abs().max().item() for x in (ours, theirs))
    assert error <= 2 * allowed + 4 * torch.finfo(torch.float32).eps * exact.abs().max().item()


def attention_case(heads: int, kv_heads: int, d: int, spans: list, dtype: torch.dtype) -> list:
    """Make the arguments of `attend` except the scale.

    q, k and v share a tensor, keys and values another. Tokens that no row may read are NaN.
    """
    generator = torch.Generator().manual_seed(heads)
    spans = torch.tensor(spans, dtype=torch.int32)
    rows, tokens = len(spans), int(spans[:, [0, 2]].max() + spans[:, [1, 3]].max()) + 3
    projected = torch.randn(rows, heads + 2 * kv_heads, d, generator=generator)
    angles = 6 * torch.rand(rows, d // 2, generator=generator).repeat(1, 2)
    pool = torch.full((tokens, 2, kv_heads, d), torch.nan)
    for prefix_start, prefix_len, own_start, own_len in spans.tolist():
        for start, length in ((prefix_start, prefix_len), (own_start, own_len - 1)):
            pool[start : start + length] = torch.randn(length, 2, kv_heads, d, generator=generator)
    q, k, v = projected.to(dtype).split([heads, kv_heads, kv_heads], dim=1)
    cos, sin = angles.cos().to(dtype), angles.sin().to(dtype)
    keys, values = pool.to(dtype).unbind(1)
    return [q, k, v, cos, sin, keys, values, spans]


def turned(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Apply the rotary embedding by its definition: channels i and i + d/2 are a complex number."""
    half = x.shape[-1] // 2
    turns = torch.complex(cos[:, :half], sin[:, :half]).unsqueeze(1)
    pairs = torch.complex(x[..., :half], x[..., half:]) * turns
    return torch.cat([pairs.real, pairs.imag], dim=-1)


def plain_attention(q, k, v, cos, sin, keys, values, spans, scale: float) -> torch.Tensor:
    """Attend row by row, with the row's tokens gathered, kv heads repeated, and a full softmax.

    The rotation is transformers', except in fp64.
    """
    if q.dtype == torch.float64:
        q, k = (turned(x, cos, sin) for x in (q, k))
    else:
        q, k = apply_rotary_pos_emb(q, k, cos, sin)
    out = []
    for row, (prefix_start, prefix_len, own_start, own_len) in enumerate(spans.tolist()):
        past = [
            *range(prefix_start, prefix_start + prefix_len),
            *range(own_start, own_start + own_len - 1),
        ]
        parts = [torch.cat([pool[past], new[row][None]]) for pool, new in ((keys, k), (values, v))]
        repeated = [
            x.transpose(0, 1).repeat_interleave(q.shape[1] // k.shape[1], dim=0) for x in parts
        ]
        out.append(
            F.scaled_dot_product_attention(q[row].unsqueeze(1), *repeated, scale=scale).squeeze(1)
        )
    return torch.stack(out)


def check_draws(logits, uniform, temperature: float, banned: tuple, token, logp) -> None:
    """Assert that tokens and log-probabilities are those of fp64, up to rounding in fp32.

    A token is that of the inverse distribution function.
    """
    z = logits.double().cpu() / (temperature or 1.0)
    token, logp = token.cpu(), logp.cpu()
    assert token.dtype == torch.int64 and logp.dtype == torch.float32
    exact = z.log_softmax(-1).gather(1, token[:, None]).squeeze(1)
    torch.testing.assert_close(logp.double(), exact, rtol=2e-6, atol=2e-6)
    z[:, list(banned)] = -torch.inf
    p = z.softmax(-1)
    chosen = p.gather(1, token[:, None]).squeeze(1)
    if temperature == 0:
        assert torch.equal(token, z.argmax(-1))
    else:
        assert (chosen > 0).all()
        end = p.cumsum(-1).gather(1, token[:, None]).squeeze(1)
        uniform, slack = uniform.double().cpu(), 2e-6
        assert (uniform < end + slack).all() and (uniform > end - chosen - slack).all()


def logits_case(rows: int, v: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw logits that are flat, peaked, or filtered at either end, and both ends of uniform."""
    generator = torch.Generator().manual_seed(v)
    sizes = torch.tensor([0.1, 1, 4, 30])[torch.arange(rows) % 4, None]
    logits = torch.randn(rows, v, generator=generator) * sizes
    logits[1::3, : v // 2] = -torch.inf
    logits[2::3, v // 2 :] = -torch.inf
    uniform = torch.rand(rows, generator=generator)
    uniform[::4], uniform[1::4] = 0.0, LARGEST_UNIFORM
    return logits.to(dtype), uniform


def unsound_rows(v: int) -> torch.Tensor:
    """Make rows without a token to draw when 3 and 5 are banned, and a last one that has tokens."""
    rows = torch.zeros(6, v)
    rows[0, v - 1] = torch.nan
    rows[1, 1] = torch.inf
    rows[2] = -torch.inf
    rows[3] = -torch.inf
    rows[3, [3, 5]] = 1.0
    rows[4, 5] = torch.nan
    rows[5, 3] = 300.0
    return rows


SPANS = [[0, 70, 80, 1], [0, 70, 120, 66], [7, 0, 200, 1], [7, 0, 210, 20]]


@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(12, 2, 128), (7, 1, 16), (4, 4, 32)])
def test_attention_is_that_of_a_full_softmax(heads, kv_heads, d):
    _, k, v, cos, sin, keys, values, spans = case = attention_case(
        heads, kv_heads, d, SPANS, torch.float64
    )
    exact = plain_attention(*case, d**-0.5)
    before = keys.clone(), values.clone()
    torch.testing.assert_close(attend_ref(*case, d**-0.5), exact, rtol=1e-12, atol=1e-12)

    new = (spans[:, 2] + spans[:, 3] - 1).long()
    torch.testing.assert_close(keys[new], reference.rotate(k, cos, sin), rtol=0, atol=0)
    torch.testing.assert_close(values[new], v, rtol=0, atol=0)
    for pool, old in zip((keys, values), before, strict=True):
        pool[new] = old[new]
        torch.testing.assert_close(pool, old, rtol=0, atol=0, equal_nan=True)

    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        case = attention_case(heads, kv_heads, d, SPANS, dtype)
        exact = plain_attention(*[x.double() for x in case[:7]], spans, d**-0.5)
        theirs = plain_attention(*case, d**-0.5)
        check_error(attend_ref(*case, d**-0.5), theirs, exact)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize(("heads", "kv_heads", "d"), [(16, 8, 128), (8, 2, 64), (2, 2, 32)])
def test_heads_are_normed_as_transformers_does_before_the_rotation(heads, kv_heads, d, dtype):
    q, k, *rest = case = attention_case(heads, kv_heads, d, SPANS, dtype)
    norms, scale, theirs = head_norms(d, dtype), d**-0.5, []
    for x, weight in ((q, norms.q), (k, norms.k)):
        module = Qwen3RMSNorm(d, norms.eps)
        module.weight = torch.nn.Parameter(weight, requires_grad=False)
        theirs.append(module(x))
    exact = plain_attention(
        *exactly_normed(q, k, norms), *(x.double() for x in rest[:5]), rest[5], scale
    )
    ours = attend_ref(*case, scale, norms)
    check_error(ours, plain_attention(*theirs, *rest, scale), exact)
    new = (rest[5][:, 2] + rest[5][:, 3] - 1).long()
    assert torch.equal(case[5][new], reference.rotate(theirs[1], *rest[1:3]))
    without = attend_ref(*attention_case(heads, kv_heads, d, SPANS, dtype), scale)
    assert (without.double() - exact).abs().max() > 20 * (ours.double() - exact).abs().max()


def test_attention_is_the_native_kernels_where_they_take_the_rows(monkeypatch):
    case, norms = attention_case(2, 1, 16, SPANS[:1], torch.float32), head_norms(16)
    monkeypatch.setattr(attention_native, "attend", lambda *arguments: arguments)
    for takes in (True, False):
        monkeypatch.setattr(attention_native, "takes", lambda q, takes=takes: takes)
        out = attend(*case, 0.25, norms)
        assert isinstance(out, tuple) == takes and (not takes or out[-1] is norms)


@pytest.mark.parametrize("v", [1, 300, reference.WHOLE_ROW, reference.WHOLE_ROW + 1, 10_000])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_draws_follow_the_inverse_distribution_function(v, dtype):
    logits, uniform = logits_case(24, v, dtype)
    for temperature, banned in ((1.0, ()), (0.7, ()), (1.5, (v // 2 - 1, v // 2)), (0.0, (v - 2,))):
        if v == 1:
            logits, banned = torch.zeros_like(logits), ()
        check_draws(
            logits, uniform, temperature, banned, *sample_ref(logits, uniform, temperature, banned)
        )


def test_draws_have_their_probabilities():
    n, banned, temperature = 20_000, (2, 7), 0.8
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(40, generator=generator)
    token, _ = sample_ref(
        logits.expand(n, -1), torch.rand(n, generator=generator), temperature, banned
    )
    p = (logits / temperature).index_fill(0, torch.tensor(banned), -torch.inf).softmax(-1)
    counts = token.bincount(minlength=40)
    assert counts[list(banned)].sum() == 0
    chi_square = ((counts - n * p).square() / (n * p)).nansum().item()
    freedom = 40 - len(banned) - 1
    assert chi_square < freedom + SIX_SIGMA * math.sqrt(2 * freedom)


@pytest.mark.parametrize("v", [50, 10_000])
def test_rows_without_a_sound_distribution_give_no_token(v):
    for temperature in (1.0, 0.0):
        token, logp = sample_ref(unsound_rows(v), torch.rand(6), temperature, (3, 5))
        assert (token[:5] == -1).all() and logp[:5].isnan().all()
        assert token[5] not in (-1, 3, 5)
        assert logp[5].item() == pytest.approx(-300)  # a banned token has nearly all probability


def test_greedy_takes_the_first_of_equals():
    logits = torch.zeros(2, 9000)
    logits[0, [5, 70, 8000]] = logits[1, [8000, 8500]] = 3.0
    token, _ = sample_ref(logits, torch.rand(2), 0.0, (5,))
    assert token.tolist() == [70, 8000]
    with pytest.raises(ValueError, match=r"temperature is -1"):
        operations.sample(logits, torch.rand(2), -1.0)
