"""Rows that must not harm the others on the native CPU kernels.

They hold banned tokens or NaN, have weight 0, or a target outside the vocabulary.
"""

import math

import pytest
import torch

from mr1_fast import grpo_loss, token_logprobs
from mr1_fast.kernels.grpo import rows_native

from ...data.loss import (
    SURROGATES,
    assert_results_within_bound,
    assert_within_bound,
    double,
    loss_rows,
    objective_of,
    reference,
)
from ...data.native import (
    DTYPES,
    EVERYTHING,
    INSTRUCTION_SETS,
    gradient_rows,
    run_rows,
    threads,
    using,
)

SPLIT = 7 * 32768  # columns enough for seven threads
OTHERS = [0, 2, 3, 4]
NAMES = ("logp", "entropy", "kl", "clipped", "kl_limited")


@pytest.fixture(params=INSTRUCTION_SETS, autouse=True)
def instruction_set(request):
    with using(request.param):
        yield request.param


def run(logits, **arguments):
    leaf = logits.detach().clone().requires_grad_()
    result = grpo_loss(leaf, **arguments)
    return result, torch.autograd.grad(result.loss, leaf)[0]


def assert_row_reports_nan_alone(logits, arguments, clean):
    """Row 1 is poisoned."""
    result, gradient = run(logits, **arguments)
    assert result.loss.isnan() and result.logp[1].isnan() and result.entropy[1].isnan()
    for name in NAMES:
        assert torch.equal(getattr(result, name)[OTHERS], getattr(clean[0], name)[OTHERS]), name
    assert (gradient[1] == 0).all() and torch.equal(gradient[OTHERS], clean[1][OTHERS])


@pytest.mark.parametrize("column", [0, 20, 36, slice(None)], ids=["first", "middle", "last", "all"])
@pytest.mark.parametrize("poison", [math.nan, -math.nan, math.inf])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_nan_and_infinite_logits_show_in_their_row_alone(dtype, poison, column):
    data = loss_rows(5, 37, dtype)
    arguments = objective_of(data, *EVERYTHING) | {"beta": 0.1}
    clean = run(data["logits"], **arguments)
    data["logits"][1, column] = poison
    assert_row_reports_nan_alone(data["logits"], arguments, clean)


@pytest.mark.parametrize("column", [0, 4095, 4096, 9000, 20010])
@pytest.mark.parametrize("poison", [math.nan, math.inf])
def test_nan_and_infinite_logits_show_wherever_they_are(poison, column):
    data = loss_rows(5, 20011)
    arguments = objective_of(data) | {"beta": 0.0}
    clean = run(data["logits"], **arguments)
    data["logits"][1, column] = poison
    assert_row_reports_nan_alone(data["logits"], arguments, clean)


@pytest.mark.parametrize("poison", [math.nan, math.inf])
@pytest.mark.parametrize("column", [5, SPLIT // 2, SPLIT - 1])
def test_nan_and_infinite_logits_show_in_a_split_row(column, poison):
    data = loss_rows(1, SPLIT)
    data["token_weights"].fill_(1)
    data["logits"][0, column] = poison
    with threads(7):
        results, gradient = gradient_rows(data)
        _, _, _, log_sum = rows_native.row_logprobs(
            data["logits"], data["targets"], torch.tensor(1.0)
        )
    assert (
        results.loss.isnan()
        and results.logp.isnan()
        and results.entropy.isnan()
        and not log_sum.isfinite()
    )
    assert (gradient == 0).all()


def test_a_part_of_nan_alone_shows_in_a_split_row():
    data = loss_rows(1, SPLIT)
    data["logits"] -= 1e6
    data["logits"][0, : SPLIT // 6] = math.nan
    with threads(7):
        assert run_rows(data).logp.isnan()


BANNED = {
    "some": lambda v: (torch.arange(v) - v) % 3 != 0,
    "the first 8192": lambda v: torch.arange(v) < 8192,
    "all but the last 5": lambda v: torch.arange(v) < v - 5,
    "all but the target": lambda v: torch.arange(v) != v - 3,
    "blocks in the middle": lambda v: (torch.arange(v) >= 4096) & (torch.arange(v) < v - 100),
}


def assert_banned_tokens_do_not_count(v, banned, offset, dtype, rows):
    data = loss_rows(rows, v, dtype)
    data["logits"] = (data["logits"].float() + offset).to(dtype)
    data["targets"].fill_(v - 3)
    data["logits"][:, banned] = -math.inf
    data["token_weights"].fill_(1)
    logp = torch.log_softmax(data["logits"].double(), -1)[:, v - 3].float()
    arguments = objective_of(data) | {"beta": 0.1, "ref_logp": logp - 0.3}
    result, gradient = run(data["logits"], **arguments)
    eager, exact = (
        reference(x, **a)
        for x, a in ((data["logits"], arguments), double_of(data["logits"], arguments))
    )
    assert_results_within_bound(result, eager[0], exact[0])
    assert_within_bound(gradient, eager[1], exact[1], "gradient", scale=1.0)
    assert (gradient[:, banned] == 0).all()


def double_of(logits, arguments):
    return logits.double(), double(arguments)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", [0, -300, 300])
@pytest.mark.parametrize("which", BANNED)
def test_banned_tokens_do_not_count_wherever_they_and_the_others_are(which, offset, dtype):
    assert_banned_tokens_do_not_count(12345, BANNED[which](12345), offset, dtype, 2)


@pytest.mark.parametrize("offset", [0, -300])
@pytest.mark.parametrize("which", BANNED)
def test_banned_tokens_of_a_split_row(which, offset):
    with threads(7):
        assert_banned_tokens_do_not_count(SPLIT, BANNED[which](SPLIT), offset, torch.float32, 1)


@pytest.mark.parametrize("grad_entropy", [0.5, -3.0])
def test_banned_tokens_have_no_gradient_through_the_entropy(grad_entropy):
    data = loss_rows(3, 37)
    data["logits"][:, 5:20] = -math.inf
    data["targets"].fill_(30)
    leaf = data["logits"].clone().requires_grad_()
    logp, entropy = token_logprobs(leaf, data["targets"])
    gradient = torch.autograd.grad((logp + grad_entropy * entropy).sum(), leaf)[0]
    exact = data["logits"].double()
    allowed = exact.isfinite()
    p, log_p = exact.softmax(-1), exact.log_softmax(-1).where(allowed, 0.0)
    by_entropy = -p * (log_p - (p * log_p).sum(-1, keepdim=True))
    expected = torch.nn.functional.one_hot(data["targets"], 37) - p + grad_entropy * by_entropy
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-6)
    assert (gradient[~allowed] == 0).all()


def test_a_banned_target_gives_minus_infinity_and_its_gradient_is_finite():
    data = loss_rows(2, 37)
    data["logits"][:, 5] = -math.inf
    data["targets"].fill_(5)
    leaf = data["logits"].clone().requires_grad_()
    logp, entropy = token_logprobs(leaf, data["targets"])
    assert (logp == -math.inf).all() and entropy.isfinite().all()
    p = data["logits"].double().softmax(-1)
    expected = torch.nn.functional.one_hot(data["targets"], 37) - p
    gradient = torch.autograd.grad(logp.sum(), leaf, retain_graph=True)[0]
    torch.testing.assert_close(gradient.double(), expected, rtol=1e-5, atol=1e-7)
    by_both = torch.autograd.grad((logp + entropy).sum(), leaf)[0]
    assert by_both.isfinite().all() and (by_both[:, 5] == 1).all()
    arguments = objective_of(data, *EVERYTHING) | {
        "beta": 0.1,
        "advantages": torch.tensor([1.0, -1.0]),
    }
    result, gradient = run(data["logits"], **arguments)
    eager, eager_gradient = reference(data["logits"], **arguments)
    torch.testing.assert_close(result.kl, eager.kl)
    torch.testing.assert_close(gradient, eager_gradient)
    assert torch.equal(result.clipped, eager.clipped) and result.kl_limited.all()


@pytest.mark.parametrize("v", [37, 20011, SPLIT])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_rows_without_any_finite_logit_report_nan(dtype, v):
    data = loss_rows(2, v, dtype)
    data["token_weights"].fill_(1)
    data["logits"][1] = -math.inf
    with threads(7):
        results, gradient = gradient_rows(data)
        assert results.logp.isnan().tolist() == results.loss.isnan().tolist() == [False, True]
        assert (gradient[1] == 0).all() and gradient.isfinite().all()
        leaf = data["logits"].clone().requires_grad_()
        logp, entropy = token_logprobs(leaf, data["targets"])
        (logp + entropy).sum().backward()
    assert (
        logp.isnan().tolist() == [False, True]
        and (leaf.grad[1] == 0).all()
        and leaf.grad.isfinite().all()
    )


@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_a_row_of_weight_zero_contributes_exactly_zero(surrogate, poison):
    data = loss_rows(5, 37)
    data["token_weights"][1] = 0
    arguments = objective_of(data, *EVERYTHING) | SURROGATES[surrogate] | {"beta": 0.1}
    expected, expected_gradient = run(data["logits"], **arguments)
    assert (expected_gradient[1] == 0).all() and (expected_gradient[OTHERS] != 0).any(1).all()
    for name in (*EVERYTHING, "advantages", "logits"):
        poisoned = {"logits": data["logits"], **arguments}
        poisoned[name] = poisoned[name].clone()
        poisoned[name][1] = poison
        result, gradient = run(**poisoned)
        assert result.loss.item() == expected.loss.item(), name
        assert torch.equal(gradient, expected_gradient), name
        assert result.kl[1] == 0 and not result.clipped[1] and not result.kl_limited[1], name


@pytest.mark.parametrize("poisoned", ["old_logp", "ref_logp", "is_weights", "advantages"])
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_a_nan_input_of_a_row_that_counts_is_reported_and_does_not_reach_its_gradient(
    surrogate, poisoned
):
    data = loss_rows(5, 37)
    arguments = objective_of(data, *EVERYTHING) | {"beta": 0.1} | SURROGATES[surrogate]
    _, expected = run(data["logits"], **arguments)
    arguments[poisoned] = arguments[poisoned].clone()
    arguments[poisoned][1] = math.nan
    result, gradient = run(data["logits"], **arguments)
    assert result.loss.isnan()
    assert (gradient[1] == 0).all() and torch.equal(gradient[OTHERS], expected[OTHERS])


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("old_logp", [-math.inf, math.inf])
def test_an_infinite_log_ratio_gives_a_finite_gradient(old_logp, surrogate):
    data = loss_rows(4, 37)
    data["old_logp"][:2] = old_logp
    data["advantages"][:2] = torch.tensor([1.0, -1.0])
    arguments = objective_of(data, *EVERYTHING) | {"beta": 0.1} | SURROGATES[surrogate]
    assert run(data["logits"], **arguments)[1].isfinite().all()


def test_k3_is_bounded_and_says_so():
    data = loss_rows(3, 37)
    data["token_weights"].fill_(1)
    logp = token_logprobs(data["logits"], data["targets"])[0]
    arguments = objective_of(data) | {"advantages": torch.zeros(3), "beta": 0.1}
    result, gradient = run(
        data["logits"], **arguments, ref_logp=logp + torch.tensor([25.0, -25.0, 1.0])
    )
    assert result.kl_limited.tolist() == [True, True, False]
    assert result.kl[:2].tolist() == pytest.approx(
        [math.exp(20) - 21, math.exp(-20) + 19], rel=1e-6
    )
    assert (gradient[:2] == 0).all() and (gradient[2] != 0).any()


def test_k3_of_small_log_ratios_keeps_its_digits():
    data = loss_rows(64, 37)
    logp = token_logprobs(data["logits"], data["targets"])[0]
    distances = torch.logspace(-4, -2, 64) * torch.tensor([1.0, -1.0]).repeat(32)
    data["token_weights"].fill_(1)
    result = grpo_loss(data["logits"], **objective_of(data), ref_logp=logp + distances, beta=0.1)
    d = (logp + distances).double() - logp.double()
    torch.testing.assert_close(result.kl.double(), torch.expm1(d) - d, rtol=2e-3, atol=0)
    assert (torch.exp(d.float()) - d.float() - 1 - result.kl).abs().max() > 1e-8, (
        "the plain formula loses them"
    )


@pytest.mark.parametrize(
    "target", [-1, -100, 37, 38, 2**31 - 1, 2**31, 2**32, 2**32 + 5, -(2**32), 2**62, -(2**62)]
)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_target_outside_the_vocabulary_gives_nan_and_no_gradient(dtype, target):
    data = loss_rows(5, 37, dtype)
    temperature = torch.tensor(1.0)
    expected = rows_native.row_logprobs(data["logits"], data["targets"], temperature)[0]
    data["targets"][1] = target
    results, gradient = gradient_rows(data)
    for logp in (
        results.logp,
        rows_native.row_logprobs(data["logits"], data["targets"], temperature)[0],
    ):
        assert logp[1].isnan() and torch.equal(logp[OTHERS], expected[OTHERS])
    assert results.loss[1].isnan() and (gradient[1] == 0).all()


@pytest.mark.parametrize("target", [-100, 37, 2**32 + 5])
def test_a_target_outside_the_vocabulary_gives_no_gradient_in_the_backward_of_log_probs(target):
    data = loss_rows(5, 37)
    data["targets"][1] = target
    temperature, gradient = torch.tensor(1.0), torch.full_like(data["logits"], math.nan)
    _, *kept = rows_native.row_logprobs(data["logits"], data["targets"], temperature)
    by_row = (data["targets"], temperature, *kept, torch.ones(5), torch.ones(5))
    rows_native.row_logprobs_backward(data["logits"], *by_row, gradient)
    assert gradient.isfinite().all() and (gradient[OTHERS] != 0).any(1).all()
    assert (gradient[1] == 0).all()


def test_targets_at_both_ends_of_the_vocabulary():
    data = loss_rows(2, 4099)
    data["targets"] = torch.tensor([0, 4098])
    data["token_weights"].fill_(1)
    _, gradient = gradient_rows(data, optional=())
    _, exact = reference(data["logits"].double(), **double(objective_of(data)), beta=0.0)
    torch.testing.assert_close(gradient.double(), exact, rtol=1e-5, atol=1e-9)
