"""Rows that must not harm the others: weight 0, NaN, banned tokens, targets out of range."""

import math

import pytest
import torch

from mr1_fast import grpo_loss, token_logprobs
from mr1_fast.kernels.grpo import rows_triton
from mr1_fast.kernels.grpo.objective import Objective, RowResults
from mr1_fast.kernels.grpo.reference import token_logprobs_ref

from ..data.loss import (
    MASKS,
    SURROGATES,
    assert_results_within_bound,
    assert_within_bound,
    double,
    loss_rows,
    objective_of,
    poisoned,
    reference,
    run_logprobs,
)

EVERYTHING = ("old_logp", "ref_logp", "is_weights")


def run(logits, **arguments):
    logits = logits.detach().clone().requires_grad_()
    result = grpo_loss(logits, **arguments)
    result.loss.backward()
    return result, logits.grad


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_all_tokens_masked(device, surrogate):
    data = loss_rows(5, 37, torch.bfloat16, device)
    data["token_weights"].zero_()
    data["old_logp"][1], data["ref_logp"][2] = math.nan, math.inf
    result, gradient = run(
        data["logits"], **objective_of(data, *EVERYTHING), beta=0.1, **SURROGATES[surrogate]
    )
    assert result.loss.item() == 0
    assert (gradient == 0).all() and (result.kl == 0).all()
    assert not result.clipped.any() and not result.kl_limited.any()
    assert result.logp.isfinite().all() and result.entropy.isfinite().all()


@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_a_row_of_weight_zero_contributes_exactly_zero(device, surrogate, poison):
    data = loss_rows(4, 37, device=device)
    data["token_weights"][2] = 0
    arguments = objective_of(data, *EVERYTHING) | SURROGATES[surrogate] | {"beta": 0.1}
    expected, expected_gradient = run(data["logits"], **arguments)
    assert (expected_gradient[2] == 0).all() and (expected_gradient[[0, 1, 3]] != 0).any(1).all()
    for name in (*EVERYTHING, "advantages", "logits"):
        poisoned = (data["logits"] if name == "logits" else arguments[name]).clone()
        poisoned[2] = poison
        if name == "logits":
            result, gradient = run(poisoned, **arguments)
        else:
            result, gradient = run(data["logits"], **arguments | {name: poisoned})
        assert result.loss.item() == expected.loss.item(), name
        assert torch.equal(gradient, expected_gradient), name
        assert result.kl[2] == 0 and not result.clipped[2] and not result.kl_limited[2], name


@pytest.mark.parametrize("advantage", [1.0, -1.0])
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_nan_logits_show_in_the_loss_of_every_surrogate(device, surrogate, advantage):
    data = loss_rows(3, 37, device=device)
    data["logits"][1, 20] = math.nan
    data["advantages"][1] = advantage
    for optional in ((), ("old_logp",)):
        result, gradient = run(
            data["logits"], **objective_of(data, *optional), beta=0.0, **SURROGATES[surrogate]
        )
        assert result.loss.isnan()
        assert (gradient[1] == 0).all() and gradient.isfinite().all()


@pytest.mark.parametrize("column", [0, 20, 36])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_nan_logits_show_in_their_row_alone(device, dtype, column):
    data = loss_rows(5, 37, dtype, device)
    arguments = objective_of(data, *EVERYTHING) | {"beta": 0.1}
    expected, expected_gradient = run(data["logits"], **arguments)
    logits = data["logits"].clone()
    logits[1, column] = math.nan
    result, gradient = run(logits, **arguments)
    others = torch.tensor([0, 2, 3, 4], device=device)
    assert result.loss.isnan() and result.logp[1].isnan()
    for name in ("logp", "entropy", "kl", "clipped", "kl_limited"):
        assert torch.equal(getattr(result, name)[others], getattr(expected, name)[others]), name
    assert (gradient[1] == 0).all()
    assert torch.equal(gradient[others], expected_gradient[others])


def test_nan_logits_show_in_their_log_probs_alone(device):
    data = loss_rows(4, 37, device=device)
    logits = data["logits"].clone()
    logits[1, 30] = math.nan

    def gradient(logits):
        logits = logits.clone().requires_grad_()
        logp, entropy = token_logprobs(logits, data["targets"])
        (logp + 0.5 * entropy).sum().backward()
        return logp.detach(), entropy.detach(), logits.grad

    others = torch.tensor([0, 2, 3], device=device)
    logp, entropy, poisoned = gradient(logits)
    assert logp[1].isnan() and entropy[1].isnan() and (poisoned[1] == 0).all()
    for value, expected in zip((logp, entropy, poisoned), gradient(data["logits"]), strict=True):
        assert torch.equal(value[others], expected[others])


@pytest.mark.parametrize("poisoned", ["old_logp", "ref_logp", "is_weights", "advantages"])
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_a_nan_input_of_a_row_that_counts_is_reported_and_does_not_reach_its_gradient(
    device, surrogate, poisoned
):
    data = loss_rows(4, 37, device=device)
    arguments = objective_of(data, *EVERYTHING) | {"beta": 0.1} | SURROGATES[surrogate]
    _, expected = run(data["logits"], **arguments)
    arguments[poisoned] = arguments[poisoned].clone()
    arguments[poisoned][2] = math.nan
    result, gradient = run(data["logits"], **arguments)
    assert result.loss.isnan()
    assert (gradient[2] == 0).all()
    assert torch.equal(gradient[[0, 1, 3]], expected[[0, 1, 3]])


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("old_logp", [-math.inf, math.inf])
def test_an_infinite_log_ratio_gives_a_finite_gradient(device, old_logp, surrogate):
    data = loss_rows(4, 37, device=device)
    data["old_logp"][:2] = old_logp
    data["advantages"][:2] = torch.tensor([1.0, -1.0])
    arguments = objective_of(data, *EVERYTHING) | {"beta": 0.1} | SURROGATES[surrogate]
    _, gradient = run(data["logits"], **arguments)
    assert gradient.isfinite().all()


def test_k3_is_bounded_and_says_so(device):
    data = loss_rows(3, 37, device=device)
    data["token_weights"].fill_(1)
    logp = token_logprobs(data["logits"], data["targets"])[0]
    distance = torch.tensor([25.0, -25.0, 1.0], device=device)
    arguments = objective_of(data) | {"advantages": torch.zeros(3, device=device), "beta": 0.1}
    result, gradient = run(data["logits"], **arguments, ref_logp=logp + distance)
    assert result.kl_limited.tolist() == [True, True, False]
    assert result.kl[:2].tolist() == pytest.approx(
        [math.exp(20) - 21, math.exp(-20) + 19], rel=1e-5
    )
    assert (gradient[:2] == 0).all() and (gradient[2] != 0).any()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("banned", ["some", "first block", "all but the target"])
def test_banned_tokens(device, banned, dtype):
    v = 200  # four blocks in the interpreter
    data = loss_rows(4, v, dtype, device)
    target = 150
    data["targets"].fill_(target)
    allowed = {
        "some": torch.arange(v) % 3 == 0,
        "first block": torch.arange(v) >= 128,
        "all but the target": torch.arange(v) == target,
    }[banned].to(device)
    data["logits"][:, ~allowed] = -math.inf
    logp = torch.log_softmax(data["logits"].double(), -1)[:, target].float()
    data |= {"old_logp": logp + 0.1, "ref_logp": logp - 0.3}
    arguments = objective_of(data, "old_logp", "ref_logp") | {"beta": 0.1}
    result, gradient = run(data["logits"], **arguments)
    eager, eager_gradient = reference(data["logits"], **arguments)
    exact, exact_gradient = reference(data["logits"].double(), **double(arguments))
    assert_results_within_bound(result, eager, exact)
    assert_within_bound(gradient, eager_gradient, exact_gradient, "gradient")
    assert (gradient[:, ~allowed] == 0).all()


@pytest.mark.parametrize("grad_entropy", [0.5, 3.0, -3.0])
def test_banned_tokens_have_no_gradient_through_the_entropy(device, grad_entropy):
    data = loss_rows(3, 37, device=device)
    data["logits"][:, 5:20] = -math.inf
    data["targets"].fill_(30)

    def gradient(function, logits):
        logits = logits.clone().requires_grad_()
        logp, entropy = function(logits, data["targets"])
        (logp + grad_entropy * entropy).sum().backward()
        return logits.grad

    exact = data["logits"].double()
    allowed = exact.isfinite()
    p, logp = (
        exact.softmax(-1),
        exact.log_softmax(-1).where(allowed, torch.tensor(0.0, device=device).double()),
    )
    by_entropy = -p * (logp - (p * logp).sum(-1, keepdim=True))
    onehot = torch.nn.functional.one_hot(data["targets"], 37)
    expected = (onehot - p) + grad_entropy * by_entropy
    torch.testing.assert_close(
        gradient(token_logprobs, data["logits"]).double(), expected, rtol=1e-5, atol=1e-6
    )
    assert (gradient(token_logprobs, data["logits"])[~allowed] == 0).all()


def test_rows_without_any_finite_logit_report_nan(device):
    data = loss_rows(3, 37, device=device)
    data["logits"][1] = -math.inf
    result, gradient = run(data["logits"], **objective_of(data), beta=0.0)
    assert result.loss.isnan() and result.logp.isnan().tolist() == [False, True, False]
    assert gradient.isfinite().all() and (gradient[1] == 0).all()


def test_logits_of_fp16s_largest_numbers(device):
    logits = torch.full((1, 37), -65504.0, dtype=torch.float16, device=device)
    logits[0, :2] = 65504.0
    targets = torch.zeros(1, dtype=torch.int64, device=device)
    logp, entropy = token_logprobs(logits, targets)
    assert logp.item() == pytest.approx(-math.log(2)) and entropy.item() == pytest.approx(
        math.log(2)
    )
    ref_logp, ref_entropy = token_logprobs_ref(logits, targets)
    assert (ref_logp.item(), ref_entropy.item()) == pytest.approx((logp.item(), entropy.item()))


@pytest.mark.parametrize("target", [-1, -100, 37, 38, 2**31 - 1, 2**31, 2**32, 2**32 + 5, -(2**32)])
@pytest.mark.parametrize("columns", [64, 16])
def test_a_target_outside_the_vocabulary_gives_nan_and_no_read(device, columns, target):
    data = loss_rows(3, 37, device=device)
    expected = rows_triton.row_logprobs(
        data["logits"], data["targets"], torch.tensor(1.0, device=device)
    )[0]
    data["targets"][1] = target
    objective = Objective(
        advantages=data["advantages"],
        token_weights=data["token_weights"],
        beta=torch.tensor(0.0, device=device),
        temperature=torch.tensor(1.0, device=device),
    )
    results, out = RowResults.empty(data["logits"]), torch.empty_like(data["logits"])
    tile = rows_triton.LossTile(2 * columns, 4, 0)
    rows_triton.row_grpo(data["logits"], data["targets"], objective, results, out, tile)
    logprobs = rows_triton.row_logprobs(data["logits"], data["targets"], objective.temperature)[0]
    for logp in (results.logp, logprobs):
        assert logp.isnan().tolist() == [False, True, False]
        torch.testing.assert_close(logp[[0, 2]], expected[[0, 2]])
    assert results.loss[1].isnan() and (out[1] == 0).all()


def test_a_mask_of_the_lowest_finite_number_leaves_entropy_and_gradient_finite(device):
    data = loss_rows(3, 4099, device=device)
    data["logits"][:, :3000] = torch.finfo(torch.float32).min
    data["targets"] = data["targets"].clamp(min=3000)
    exact = token_logprobs_ref(data["logits"].double(), data["targets"])
    logits = data["logits"].clone().requires_grad_()
    logp, entropy = token_logprobs(logits, data["targets"])
    logp.sum().backward()
    torch.testing.assert_close(
        (logp.detach().double(), entropy.detach().double()), exact, rtol=0, atol=1e-5
    )
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("column", [0, 20])
def test_a_logit_beyond_what_its_scale_allows_shows_in_the_loss_alone(device, column, surrogate):
    # 3e38·log2(e) is more than fp32 holds.
    data = loss_rows(2, 37, device=device)
    data["logits"][0, column] = 3e38
    data["targets"][0] = 30
    arguments = objective_of(data, "old_logp", "ref_logp") | SURROGATES[surrogate]
    result, gradient = run(data["logits"], **arguments, beta=0.1)
    assert result.loss.isnan() and result.logp.isnan().tolist() == [True, False]
    assert (gradient[0] == 0).all() and gradient[1].isfinite().all()


@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_a_row_of_nothing_but_the_lowest_number_is_nan_and_not_infinite(
    device, monkeypatch, dtype, native
):
    if native:  # the kernels of csrc/ on a CPU
        monkeypatch.setattr("mr1_fast.kernels.grpo.rows.use_triton", lambda _: False)
        device = "cpu"
    data = loss_rows(2, 4099, dtype, device)
    data["logits"][0] = torch.finfo(dtype).min
    result, gradient = run(data["logits"], **objective_of(data), beta=0.0)
    assert result.loss.isnan() and result.logp.isnan().tolist() == [True, False]
    assert (gradient[0] == 0).all() and gradient[1].isfinite().all()


def test_targets_may_be_strided(device):
    data = loss_rows(4, 97, device=device)
    columns = torch.stack([data["targets"], 96 - data["targets"]], 1)
    strided = token_logprobs(data["logits"], columns[:, 0])
    assert torch.equal(
        torch.stack(strided), torch.stack(token_logprobs(data["logits"], data["targets"]))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("n", "v"), [(1, 37), (5, 301), (4, 1)])
@pytest.mark.parametrize("mask", MASKS)
def test_masked_rows_are_zero_and_the_others_as_they_were(device, mask, n, v, dtype):
    data = loss_rows(n, v, dtype, device)
    counts = MASKS[mask](n).to(device)
    logits, targets = poisoned(data, counts)
    ours = run_logprobs(logits, targets, token_weights=counts)
    for found, expected in zip(ours, run_logprobs(data["logits"], data["targets"]), strict=True):
        assert torch.equal(found[counts], expected[counts])
        assert (found[~counts] == 0).all()


def test_only_a_weight_of_zero_masks(device):
    data = loss_rows(5, 37, device=device)
    temperature = torch.tensor(0.8, device=device)
    rows = data["logits"], data["targets"], temperature
    weights = torch.tensor([0.5, -1.0, 0.0, torch.nan, torch.inf], device=device)
    logp, entropy, *_ = rows_triton.row_logprobs(*rows, weights)
    expected, expected_entropy, *_ = rows_triton.row_logprobs(*rows)
    assert torch.equal(logp, torch.where(weights != 0, expected, 0.0))
    assert torch.equal(entropy, torch.where(weights != 0, expected_entropy, 0.0))
