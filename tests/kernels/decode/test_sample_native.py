"""Native sampling against fp64 and the reference, on every instruction set."""

import math

import pytest
import torch

from mr1_fast.kernels.decode import operations, sample_native
from mr1_fast.kernels.decode.reference import sample_ref
from mr1_fast.kernels.decode.sample_native import sample

from ...data.native import DTYPES, INSTRUCTION_SETS, Guards, threads, using
from .test_operations import LARGEST_UNIFORM, check_draws, logits_case, unsound_rows

GROUP = 256
"""SAMPLE_GROUP of csrc/layers.h."""


@pytest.fixture(params=INSTRUCTION_SETS, autouse=True)
def instruction_set(request):
    with using(request.param):
        yield request.param


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v", [2, 15, 255, 256, 257, 457, 10_000, 151_936, 152_064])
def test_draws_follow_the_inverse_distribution_function(v, dtype):
    logits, uniform = logits_case(12 if v < 20_000 else 4, v, dtype)
    for temperature, banned in ((1.0, ()), (0.7, ()), (1.5, (v // 2 - 1, v // 2)), (0.0, (v - 1,))):
        if v == 2:
            logits, banned = logits.clamp(min=-3), banned[1:]
        drawn = sample(logits, uniform, temperature, banned)
        check_draws(logits, uniform, temperature, banned, *drawn)


def test_one_token_and_no_rows():
    for temperature in (0.0, 1.0):
        token, logp = sample(torch.full((3, 1), -50.0), torch.rand(3), temperature, ())
        assert (token == 0).all() and logp.abs().max() < 1e-6
        token, logp = sample(torch.zeros(0, 9), torch.rand(0), temperature, (3,))
        assert token.shape == logp.shape == (0,)


def test_a_token_of_weight_0_is_never_drawn():
    """Tokens of equal weights lie at either end of groups, among others that are out of reach."""
    places = [0, 100, GROUP - 1, GROUP, 3 * GROUP + 17, 5 * GROUP - 1]
    logits = torch.full((1, 6 * GROUP), -1e4)
    logits[0, places] = 2.0
    uniform = torch.arange(600) / 600
    token, logp = sample(logits.expand(600, -1), uniform, 1.0, ())
    expected = torch.tensor(places)[(uniform.double() * 6).long()]
    inside = (uniform.double() * 6).frac() > 1e-5
    assert torch.equal(token[inside], expected[inside])
    assert set(token.tolist()) == set(places)
    torch.testing.assert_close(logp, torch.full((600,), -math.log(6)), rtol=0, atol=1e-6)
    ends = torch.tensor([0.0, LARGEST_UNIFORM])
    assert sample(logits.expand(2, -1), ends, 1.0, ())[0].tolist() == [places[0], places[-1]]
    assert sample(logits.expand(2, -1), ends, 1.0, (0, 5 * GROUP - 1))[0].tolist() == [
        places[1], places[-2],
    ]  # fmt: skip


@pytest.mark.parametrize("temperature", [1e-30, 1e-3, 1e3, 1e30])
def test_any_temperature(temperature):
    logits, uniform = torch.linspace(-3, 3, 600).expand(8, -1), torch.rand(8)
    check_draws(logits, uniform, temperature, (), *sample(logits, uniform, temperature, ()))


@pytest.mark.parametrize("v", [50, 10_000])
def test_rows_without_a_sound_distribution_give_no_token(v):
    for temperature in (1.0, 0.0):
        token, logp = sample(unsound_rows(v), torch.rand(6), temperature, (3, 5))
        assert (token[:5] == -1).all() and logp[:5].isnan().all()
        assert token[5] not in (-1, 3, 5)
        assert logp[5].item() == pytest.approx(-300)
    banned_nan = torch.zeros(2, v)
    banned_nan[:, 3] = torch.tensor([math.nan, math.inf])
    assert (sample(banned_nan, torch.rand(2), 1.0, (3,))[0] == -1).all()


def test_greedy_takes_the_first_of_equals_that_is_not_banned():
    logits = torch.zeros(3, 9000)
    logits[0, [5, 70, 8000]] = logits[1, [8000, 8500]] = 3.0
    token, logp = sample(logits, torch.rand(3), 0.0, (5, 0))
    assert token.tolist() == [70, 8000, 1]
    torch.testing.assert_close(logp, sample_ref(logits, torch.rand(3), 0.0, (5, 0))[1])


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_threads_and_strides_change_nothing(dtype, monkeypatch):
    logits, uniform = logits_case(40, 5000, dtype)  # work enough for a team
    wide = torch.full((80, 5100), math.nan, dtype=dtype)
    wide[::2, 7:5007] = logits
    guards = Guards(monkeypatch)
    with threads(1):
        token, logp = sample(logits, uniform, 0.9, (4, 17))
    with threads(2):
        others = sample(wide[::2, 7:5007], uniform, 0.9, (17, 4, 17))
    assert torch.equal(token, others[0]) and torch.equal(logp, others[1])
    for row in range(0, 40, 7):
        alone = sample(logits[row : row + 1], uniform[row : row + 1], 0.9, (4, 17))
        assert (alone[0].item(), alone[1].item()) == (token[row].item(), logp[row].item())
    transposed = sample(logits.T.contiguous().T, uniform, 0.9, (4, 17))
    assert torch.equal(token, transposed[0])
    guards.assert_untouched()


def test_the_operation_chooses_it(monkeypatch):
    logits, uniform = torch.zeros(2, 9), torch.rand(2)
    monkeypatch.setattr(sample_native, "sample", lambda *arguments: "native")
    assert operations.sample(logits, uniform, 1.0) == "native"
    assert torch.is_tensor(operations.sample(logits.double(), uniform, 1.0)[0])
    monkeypatch.setattr(sample_native, "takes", lambda *arguments: False)
    assert torch.is_tensor(operations.sample(logits, uniform, 1.0)[0])


def test_what_it_takes_and_what_it_refuses():
    logits, uniform = torch.zeros(2, 9), torch.rand(2)
    assert sample_native.takes(logits, uniform) and sample_native.takes(logits.half(), uniform)
    for refused in (logits.double(), logits.to("meta"), logits[:, :0]):
        assert not sample_native.takes(refused, uniform)
    assert not sample_native.takes(logits, uniform.double())
    with pytest.raises(ValueError, match="uniform"):
        sample(logits, uniform[:1], 1.0, ())
    for banned in ((9,), (-1,)):
        with pytest.raises(IndexError, match="banned"):
            sample(logits, uniform, 1.0, banned)
