"""The native CPU kernels against fp64, on every instruction set that this machine has.

The bound is that of tests/data/loss.py.
"""

from functools import lru_cache

import pytest
import torch

from mr1_fast import grpo_loss, token_logprobs
from mr1_fast.kernels.grpo import rows_native, rows_torch
from mr1_fast.kernels.grpo.reference import token_logprobs_ref
from mr1_fast.kernels.grpo.rows import kernels_for

from ...data.loss import (
    SURROGATES,
    assert_results_within_bound,
    assert_within_bound,
    double,
    logprobs_and_gradients,
    loss_rows,
    objective_of,
    reference,
)
from ...data.native import DTYPES, EVERYTHING, INSTRUCTION_SETS, gradient_rows, threads, using

SURROGATES = SURROGATES | {"clip with delta below 1 + clip_high": {"clip_high": 0.28, "delta": 1.1}}
OPTIONS = {
    "on-policy": ((), {"beta": 0.0}),
    "off-policy": (("old_logp",), {"beta": 0.0}),
    "reference": (("ref_logp",), {"beta": 0.1}),
    "everything": (EVERYTHING, {"beta": 0.1, "temperature": 0.8}),
    "bias-corrected KL": (("old_logp", "ref_logp"), {"beta": 0.1, "bias_corrected_kl": True}),
}


@pytest.fixture(params=INSTRUCTION_SETS, autouse=True)
def instruction_set(request):
    with using(request.param):
        yield request.param


def ours(logits, *, inplace=False, **arguments):
    """(results of grpo_loss, gradient by the logits)."""
    leaf = logits.detach().clone().requires_grad_()
    result = grpo_loss(leaf * 1, **arguments, inplace=inplace)
    return result, torch.autograd.grad(result.loss, leaf)[0]


@lru_cache
def case(n: int, v: int, dtype: torch.dtype, surrogate: str, options: str):
    """(logits, arguments, eager results and gradient, exact ones)."""
    optional, settings = OPTIONS[options]
    data = loss_rows(n, v, dtype, temperature=settings.get("temperature", 1.0))
    arguments = objective_of(data, *optional) | SURROGATES[surrogate] | settings
    eager = reference(data["logits"], **arguments)
    return data["logits"], arguments, eager, reference(data["logits"].double(), **double(arguments))


def assert_matches_fp64(logits, arguments, eager, exact, inplace=False):
    result, gradient = ours(logits, **arguments, inplace=inplace)
    assert gradient.dtype == logits.dtype
    assert_results_within_bound(result, eager[0], exact[0])
    assert_within_bound(
        gradient, eager[1], exact[1], "gradient", scale=1.0
    )  # 1 − p, where p may be 1


def of_logits(logits, targets):
    """Make a case of given logits.

    It is on-policy, as an fp32 log-probability of −20,000 has no digits left for a ratio.
    """
    data = loss_rows(len(targets), logits.shape[1], logits.dtype, logits=logits) | {
        "targets": targets
    }
    data["token_weights"].fill_(1)
    arguments = objective_of(data) | {"beta": 0.0}
    return (
        logits,
        arguments,
        reference(logits, **arguments),
        reference(logits.double(), **double(arguments)),
    )


def test_the_native_kernels_take_what_a_cpu_holds(monkeypatch):
    for dtype in DTYPES:
        assert rows_native.takes(torch.zeros(1, 1, dtype=dtype))
        assert kernels_for(torch.zeros(1, 1, dtype=dtype)) is rows_native
    assert not rows_native.takes(torch.zeros(1, 1, dtype=torch.float64))
    assert not rows_native.takes(torch.zeros(1, 1, device="meta"))
    assert kernels_for(torch.zeros(1, 1, dtype=torch.float64)) is rows_torch


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_loss_and_gradient(surrogate, options, dtype):
    assert_matches_fp64(*case(20, 37, dtype, surrogate, options))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v", [1, 2, 15, 16, 17, 63, 129, 4099])
def test_vocabularies_around_the_width_of_a_vector(v, dtype):
    assert_matches_fp64(*case(9, v, dtype, "clip", "everything"), inplace=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v", [151936, 152064])
def test_real_vocabularies(v, dtype):
    assert_matches_fp64(*case(4, v, dtype, "clip", "everything"))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("count", [2, 7])
def test_one_row_split_over_threads(count, dtype):
    with threads(count):
        assert_matches_fp64(*case(1, 300001, dtype, "clip", "everything"))
        assert_matches_fp64(*case(1, 300001, dtype, "clip", "everything"), inplace=True)


@pytest.mark.parametrize("inplace", [False, True])
def test_no_rows(inplace):
    data = loss_rows(0, 37)
    leaf = data["logits"].requires_grad_()
    result = grpo_loss(leaf * 1, **objective_of(data, "ref_logp"), beta=0.1, inplace=inplace)
    (3 * result.loss).backward()
    logp, entropy = token_logprobs(leaf, data["targets"])
    (logp + entropy).sum().backward()
    assert result.loss.item() == 0 and leaf.grad.shape == (0, 37)
    assert all(value.shape == (0,) for value in (*result[1:], logp, entropy))


@pytest.mark.parametrize("temperature", [0.3, 1.7])
def test_temperature(temperature):
    data = loss_rows(6, 97, temperature=temperature)
    arguments = objective_of(data, "ref_logp") | {"beta": 0.1, "temperature": temperature}
    exact = reference(data["logits"].double(), **double(arguments))
    assert_matches_fp64(data["logits"], arguments, reference(data["logits"], **arguments), exact)


@pytest.mark.parametrize(
    ("dtype", "share"), [(torch.bfloat16, 0.97), (torch.float16, 0.99)], ids=["bf16", "fp16"]
)
def test_gradients_of_16_bits_are_the_nearest_to_the_exact_ones(dtype, share):
    logits, arguments, _, (_, exact) = case(20, 4099, dtype, "sapo", "everything")
    nearest = exact.to(dtype)
    if (
        dtype == torch.bfloat16
    ):  # through fp32, whose rounding does not shift that of bf16 but once in 2^16
        assert torch.equal(nearest, exact.float().to(dtype))
    gradient = ours(logits, **arguments)[1]
    counts = arguments["token_weights"] != 0
    assert (gradient == nearest)[counts].double().mean() >= share
    assert (gradient[~counts] == 0).all()


def test_small_probabilities_keep_their_digits_in_the_gradient():
    logits, arguments, _, (_, exact) = case(20, 4099, torch.float32, "sapo", "everything")
    gradient = ours(logits, **arguments)[1]
    others = torch.ones_like(gradient, dtype=torch.bool).scatter_(
        1, arguments["targets"][:, None], False
    )
    torch.testing.assert_close(gradient[others].double(), exact[others], rtol=1e-5, atol=0)


def ramp(v: int, low: float, high: float, jump: bool = False) -> torch.Tensor:
    """Ascending, with a last element far above if `jump`."""
    values = torch.linspace(low, high, v)
    values[-1] += 60 if jump else 0
    return values


EXTREMES = {
    "ascending by thousands": ramp(20011, -1e4, 1e4),
    "ascending by a few": ramp(20011, -3, 3),
    "ascending by tens": ramp(20011, -80, 0),
    "a jump in the last column": ramp(20011, -2, 2, jump=True),
    "descending": ramp(20011, -1e4, 1e4).flip(0),
    "two values": torch.where(torch.arange(20011) % 7 == 0, 1e4, -1e4),
    "all equal": torch.full((20011,), -777.0),
    "far below zero": ramp(20011, -9e3, -8.99e3),
}


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", EXTREMES)
def test_extreme_logits(kind, dtype):
    row = EXTREMES[kind].to(dtype)
    targets = torch.tensor([0, len(row) - 1, int(row.argmax()), 7, 12000])
    assert_matches_fp64(*of_logits(row.repeat(5, 1), targets))


@pytest.mark.parametrize("kind", EXTREMES)
def test_extreme_logits_of_one_row_over_threads(kind):
    row = EXTREMES[kind].repeat_interleave(10)
    with threads(4):
        assert_matches_fp64(*of_logits(row[None], torch.tensor([len(row) - 5])))


def test_probabilities_beyond_the_exponents_range_are_zero():
    row = torch.zeros(600)
    row[1::2] = -torch.arange(300) * 0.5  # down to 2^-216: normal, subnormal, nothing
    data = loss_rows(3, 600, logits=row.repeat(3, 1))
    data["token_weights"].fill_(1)
    _, gradient = gradient_rows(data, optional=())
    exact = reference(row.repeat(3, 1).double(), **double(objective_of(data)), beta=0.0)[1]
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-5, atol=2e-38)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v", [1, 15, 37, 4099, 151936])
def test_log_probs_entropy_and_their_gradients(v, dtype):
    data = loss_rows(5, v, dtype)
    incoming = torch.tensor([1.0, -0.5, 0.0, 2.0, 0.0]), torch.tensor([0.3, -1.5, 0.0, 0.0, 0.7])

    def run(function, logits):
        return logprobs_and_gradients(function, logits, data["targets"], incoming)

    results = run(token_logprobs, data["logits"])
    eager, exact = (
        run(token_logprobs_ref, data["logits"]),
        run(token_logprobs_ref, data["logits"].double()),
    )
    for name, *values in zip(
        ("logp", "entropy", "gradient of logp", "of both"), results, eager, exact, strict=True
    ):
        assert_within_bound(*values, name, scale=1.0)
    assert (results[3][2] == 0).all(), "a row without incoming gradient"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_peak_and_log_sum_make_up_the_log_probs(dtype):
    data = loss_rows(5, 20011, dtype)
    temperature = torch.tensor(0.8)
    logp, _, peak, log_sum = rows_native.row_logprobs(data["logits"], data["targets"], temperature)
    exact = data["logits"].double()
    assert torch.equal(peak, data["logits"].amax(-1).float())
    exact_sum = ((exact - exact.amax(-1, keepdim=True)) / temperature.double()).logsumexp(-1)
    torch.testing.assert_close(log_sum.double(), exact_sum, rtol=0, atol=1e-6)
    x = exact.gather(1, data["targets"][:, None])[:, 0]
    torch.testing.assert_close(
        logp.double(), (x - peak) / temperature - log_sum, rtol=3e-7, atol=1e-6
    )
