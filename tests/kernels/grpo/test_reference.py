"""The reference against formulas written out with Python numbers, and our functions against it."""

import math

import pytest
import torch

from mr1_fast import grpo_loss, token_logprobs
from mr1_fast.kernels.grpo.objective import KL_LOG_RATIO_LIMIT, GRPOLoss
from mr1_fast.kernels.grpo.reference import policy_loss_ref, token_logprobs_ref

from ...data.loss import SURROGATES, loss_rows, objective_of, reference

LENGTHS = (4, 0, 7, 1, 0, 13, 15)  # of the sequences among 40 rows
CU_SEQLENS = torch.tensor([0, *torch.tensor(LENGTHS).cumsum(0).tolist()])


def rows(count: int = 40, dtype: torch.dtype = torch.float64) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(0)

    def normal(scale: float) -> torch.Tensor:
        return scale * torch.randn(count, generator=generator, dtype=dtype)

    logp = -2 + normal(0.5)
    return {
        "logp": logp,
        "old_logp": logp + normal(0.3),
        "ref_logp": logp + normal(0.5),
        "advantages": normal(1.0),
        "token_weights": torch.rand(count, generator=generator, dtype=dtype),
    }


def evaluate(data, **settings):
    """(loss, derivative by each logp, kl, clipped, kl_limited) of policy_loss_ref."""
    logp = data["logp"].detach().clone().requires_grad_()
    per_token, kl, clipped, kl_limited = policy_loss_ref(**data | {"logp": logp}, **settings)
    per_token.sum().backward()
    assert not kl.requires_grad
    return per_token.sum().item(), logp.grad, kl, clipped, kl_limited


def columns(data: dict[str, torch.Tensor]):
    names = ("logp", "old_logp", "ref_logp", "advantages", "token_weights")
    return zip(*(data[name].tolist() for name in names), strict=True)


def written_out(
    data: dict[str, torch.Tensor], beta: float, low: float, high: float
) -> tuple[float, list[float]]:
    """Loss and its derivative by each logp, token by token."""
    loss, derivative = 0.0, []
    for logp, old, ref, advantage, weight in columns(data):
        ratio = math.exp(logp - old)
        clipped = min(max(ratio, 1 - low), 1 + high)
        k3 = math.exp(ref - logp) - (ref - logp) - 1
        loss += weight * (-min(ratio * advantage, clipped * advantage) + beta * k3)
        active = ratio * advantage <= clipped * advantage
        derivative.append(
            weight * (-advantage * ratio * active + beta * (1 - math.exp(ref - logp)))
        )
    return loss, derivative


def assert_loss_is(data, per_token, **settings):
    """`per_token(logp, old, ref, advantage)` is the loss, its numeric derivative the gradient."""
    loss, derivative, *_ = evaluate(data, **settings)
    expected, step = 0.0, 1e-6
    for index, (logp, old, ref, advantage, weight) in enumerate(columns(data)):
        expected += weight * per_token(logp, old, ref, advantage)
        rise = per_token(logp + step, old, ref, advantage) - per_token(
            logp - step, old, ref, advantage
        )
        expected_derivative = weight * rise / (2 * step)
        assert derivative[index].item() == pytest.approx(expected_derivative, rel=1e-6, abs=1e-8)
    assert loss == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("beta", [0.0, 0.04, 1.0])
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.1, 0.3)])
def test_is_the_papers_formula(beta, low, high):
    data = rows()
    expected, derivative = written_out(data, beta, low, high)
    for beta_as in (beta, torch.tensor(beta, dtype=torch.float64)):
        loss, gradient, kl, clipped, _ = evaluate(data, beta=beta_as, clip_low=low, clip_high=high)
        assert loss == pytest.approx(expected, rel=1e-12)
        torch.testing.assert_close(gradient, torch.tensor(derivative, dtype=torch.float64))
    no_gradient = [d == pytest.approx(0) for d in written_out(data, 0, low, high)[1]]
    assert clipped.tolist() == no_gradient, (
        "clipped marks the tokens whose surrogate has no gradient"
    )
    assert (kl >= 0).all()


@pytest.mark.parametrize("delta", [1.1, 1.35])
def test_delta_bounds_the_ratio_of_negative_advantages_too(delta):
    def per_token(logp, old, ref, advantage):
        ratio = math.exp(logp - old)
        return -min(min(ratio, delta) * advantage, min(max(ratio, 0.8), 1.3) * advantage)

    data = rows()
    data["old_logp"][:4] = data["logp"][:4] - 0.5
    assert_loss_is(data, per_token, beta=0.0, clip_high=0.3, delta=delta)
    _, gradient, _, clipped, _ = evaluate(data, beta=0.0, clip_high=0.3, delta=delta)
    assert torch.equal(clipped, gradient == 0)
    assert (clipped & (data["advantages"] < 0) & (data["logp"] > data["old_logp"])).any()


def test_cispo_caps_a_detached_ratio():
    data = rows()
    loss, derivative, _, clipped, _ = evaluate(data, beta=0.0, surrogate="cispo", clip_high=0.25)
    expected = 0.0
    for index, (logp, old, _, advantage, weight) in enumerate(columns(data)):
        capped = min(math.exp(logp - old), 1.25)
        expected += -weight * capped * advantage * logp
        assert derivative[index].item() == pytest.approx(-weight * capped * advantage, rel=1e-12)
        assert clipped[index].item() == (math.exp(logp - old) > 1.25 and advantage > 0)
    assert loss == pytest.approx(expected, rel=1e-12)


def test_sapo_gates_the_ratio_smoothly():
    def per_token(logp, old, ref, advantage):
        tau = 0.9 if advantage > 0 else 1.05
        return -4 / tau / (1 + math.exp(-tau * (math.exp(logp - old) - 1))) * advantage

    assert_loss_is(rows(), per_token, beta=0.0, surrogate="sapo", sapo_temperatures=(0.9, 1.05))


def test_bias_corrected_kl_is_k3_times_the_ratio():
    def per_token(logp, old, ref, advantage):
        ratio = math.exp(logp - old)
        k3 = math.exp(ref - logp) - (ref - logp) - 1
        return -min(ratio * advantage, min(max(ratio, 0.8), 1.2) * advantage) + 0.3 * k3 * ratio

    data = rows()
    assert_loss_is(data, per_token, beta=0.3, bias_corrected_kl=True)
    k3 = [
        math.exp(r - p) - (r - p) - 1
        for p, r in zip(data["logp"].tolist(), data["ref_logp"].tolist(), strict=True)
    ]
    expected = torch.tensor(k3, dtype=torch.float64) * (data["logp"] - data["old_logp"]).exp()
    torch.testing.assert_close(evaluate(data, beta=0.3, bias_corrected_kl=True)[2], expected)


def test_is_weights_weigh_the_surrogate_and_not_the_kl():
    data = rows()
    weights = torch.linspace(0, 2, 40, dtype=torch.float64)
    surrogate, by_surrogate, *_ = evaluate(
        data | {"token_weights": data["token_weights"] * weights}, beta=0.0
    )
    no_advantage = data | {"advantages": torch.zeros(40, dtype=torch.float64)}
    kl, by_kl, *_ = evaluate(no_advantage, beta=0.3)
    loss, derivative, *_ = evaluate(data, beta=0.3, is_weights=weights)
    assert loss == pytest.approx(surrogate + kl, rel=1e-12)
    torch.testing.assert_close(derivative, by_surrogate + by_kl)


def test_gspo_takes_the_mean_log_ratio_of_each_sequence():
    data = rows()
    data["token_weights"][[1, 5, 6, 20]] = 0  # masked tokens do not count in the mean

    def written_out(logps: list[float]) -> float:
        loss, start = 0.0, 0
        for length in LENGTHS:
            tokens = [t for t in range(start, start + length) if data["token_weights"][t] != 0]
            start += length
            if tokens:
                ratio = math.exp(
                    sum(logps[t] - data["old_logp"][t].item() for t in tokens) / len(tokens)
                )
            for t in tokens:
                advantage = data["advantages"][t].item()
                surrogate = -min(ratio * advantage, min(max(ratio, 0.97), 1.02) * advantage)
                loss += data["token_weights"][t].item() * surrogate
        return loss

    settings = dict(
        beta=0.0, ratio_level="sequence", cu_seqlens=CU_SEQLENS, clip_low=0.03, clip_high=0.02
    )
    loss, derivative, _, clipped, _ = evaluate(data, **settings)
    logps = data["logp"].tolist()
    assert loss == pytest.approx(written_out(logps), rel=1e-12)
    assert clipped.any() and not clipped.all()
    for token in range(40):
        above, below = (
            [p + (i == token) * step for i, p in enumerate(logps)] for step in (1e-6, -1e-6)
        )
        slope = (written_out(above) - written_out(below)) / 2e-6
        assert derivative[token].item() == pytest.approx(slope, rel=1e-6, abs=1e-8)


def test_on_policy_is_a_ratio_of_one_with_its_gradient():
    data = rows()
    del data["old_logp"], data["ref_logp"]
    _, gradient, kl, clipped, _ = evaluate(data, beta=0.0)
    torch.testing.assert_close(gradient, -data["token_weights"] * data["advantages"])
    assert not clipped.any() and (kl == 0).all()


@pytest.mark.parametrize("level", ["token", "sequence"])
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
def test_a_token_of_weight_zero_contributes_exactly_zero(poison, surrogate, level):
    data = rows(6) | {"is_weights": torch.ones(6, dtype=torch.float64)}
    data["token_weights"][2] = 0
    settings = SURROGATES[surrogate] | {"beta": 0.1, "ratio_level": level}
    settings["cu_seqlens"] = torch.tensor([0, 4, 6])
    clean = evaluate(data, **settings)
    for name in ("logp", "old_logp", "ref_logp", "advantages", "is_weights"):
        poisoned = data | {name: data[name].clone()}
        poisoned[name][2] = poison
        loss, gradient, *_, clipped, kl_limited = evaluate(poisoned, **settings)
        assert loss == clean[0]
        assert gradient[2] == 0
        assert torch.equal(gradient, clean[1])
        assert not clipped[2] and not kl_limited[2]


def test_k3_is_bounded_and_says_so():
    data = {
        "advantages": torch.zeros(2),
        "token_weights": torch.ones(2),
        "logp": torch.tensor([-1000.0, -1.0]),
    }
    _, gradient, kl, _, kl_limited = evaluate(data, beta=0.1, ref_logp=torch.tensor([-1.0, -1.5]))
    assert kl_limited.tolist() == [True, False]
    assert kl[0].item() == pytest.approx(math.exp(KL_LOG_RATIO_LIMIT) - KL_LOG_RATIO_LIMIT - 1)
    assert gradient.isfinite().all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("function", [token_logprobs, token_logprobs_ref])
def test_logprobs_are_as_exact_as_the_logits_allow(function, dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(7, 4099, generator=generator)).to(dtype)
    targets = torch.tensor([0, 4098, 5, 77, 1234, 2, 3])
    exact = torch.log_softmax(logits.double() / 0.6, -1)
    logp, entropy = function(logits, targets, temperature=0.6)
    assert logp.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logp.double(), exact[range(7), targets], rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy.double(), -(exact.exp() * exact).sum(-1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("function", [token_logprobs, token_logprobs_ref])
def test_entropy_with_banned_tokens_is_finite(function):
    logits = torch.tensor([[0.0, 0.0, -math.inf]])
    logp, entropy = function(logits, torch.tensor([0]))
    assert logp.item() == entropy.item() * -1 == pytest.approx(-math.log(2))


@pytest.mark.parametrize("grad_entropy", [0.5, 3.0, -3.0])
def test_banned_tokens_have_no_gradient_through_the_entropy(grad_entropy):
    logits = torch.tensor([[0.0, 1.0, -math.inf, 2.0]], dtype=torch.float64, requires_grad=True)
    allowed = torch.tensor([[0.0, 1.0, 2.0]], dtype=torch.float64, requires_grad=True)
    entropy = token_logprobs(logits, torch.tensor([0]))[1]
    (grad_entropy * entropy).sum().backward()
    (grad_entropy * token_logprobs_ref(allowed, torch.tensor([0]))[1]).sum().backward()
    torch.testing.assert_close(logits.grad[:, [0, 1, 3]], allowed.grad)
    assert logits.grad[0, 2] == 0


def test_gradients_through_log_prob_and_entropy_are_autograds():
    data = loss_rows(9, 37, torch.float64)
    factors = data["advantages"], data["is_weights"] - 1
    gradients = []
    for function in (token_logprobs, token_logprobs_ref):
        logits = data["logits"].clone().requires_grad_()
        logp, entropy = function(logits, data["targets"], 0.7)
        gradients.append(
            torch.autograd.grad((factors[0] * logp + factors[1] * entropy).sum(), logits)[0]
        )
    torch.testing.assert_close(*gradients, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("inplace", [False, True])
@pytest.mark.parametrize(
    "optional", [(), ("old_logp", "ref_logp", "is_weights")], ids=["on-policy", "off-policy"]
)
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("bias_corrected_kl", [False, True])
def test_equals_autograd_through_the_reference(surrogate, optional, bias_corrected_kl, inplace):
    data = loss_rows(20, 37, torch.float64)
    arguments = objective_of(data, *optional) | SURROGATES[surrogate]
    arguments |= {
        "beta": 0.1 if optional else 0.0,
        "temperature": 0.9,
        "bias_corrected_kl": bias_corrected_kl,
    }
    expected, expected_gradient = reference(data["logits"], **arguments)
    leaf = data["logits"].requires_grad_()
    result = grpo_loss(leaf * 1, **arguments, inplace=inplace)
    (3 * result.loss).backward()
    for name, value, expected_value in zip(GRPOLoss._fields, result, expected, strict=True):
        torch.testing.assert_close(value, expected_value, rtol=1e-11, atol=1e-13, msg=name)
        assert value.requires_grad == (name == "loss")
    torch.testing.assert_close(leaf.grad, 3 * expected_gradient, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_ratio_per_sequence_equals_autograd_through_the_reference(surrogate):
    data = loss_rows(40, 37, torch.float64)
    arguments = objective_of(data, "old_logp", "ref_logp", "is_weights") | SURROGATES[surrogate]
    arguments |= {"beta": 0.1, "ratio_level": "sequence", "cu_seqlens": CU_SEQLENS}
    expected, expected_gradient = reference(data["logits"], **arguments)
    leaf = data["logits"].requires_grad_()
    result = grpo_loss(leaf, **arguments)
    result.loss.backward()
    torch.testing.assert_close(result.loss, expected.loss)
    torch.testing.assert_close(leaf.grad, expected_gradient, rtol=1e-11, atol=1e-13)


def test_rows_of_large_vocabularies_are_taken_in_blocks(monkeypatch):
    data = loss_rows(11, 37, torch.float64)
    arguments = objective_of(data, "old_logp", "ref_logp", "is_weights") | {"beta": 0.1}

    def run():
        leaf = data["logits"].clone().requires_grad_()
        result = grpo_loss(leaf, **arguments)
        logp, entropy = token_logprobs(leaf, data["targets"])
        return *result[1:], *torch.autograd.grad(result.loss + (logp * entropy).sum(), leaf)

    whole = run()
    monkeypatch.setattr("mr1_fast.kernels.grpo.rows_torch.BLOCK_ELEMENTS", 4 * 37)
    for value, expected in zip(run(), whole, strict=True):
        torch.testing.assert_close(value, expected)


def test_a_row_of_nan_logits_is_reported_and_has_no_gradient():
    data = loss_rows(4, 37)
    arguments = objective_of(data, "old_logp", "ref_logp") | {"beta": 0.1}
    leaf = data["logits"].requires_grad_()
    clean = torch.autograd.grad(grpo_loss(leaf, **arguments).loss, leaf)[0]
    poisoned = data["logits"].detach().clone()
    poisoned[1, 5] = math.nan
    poisoned.requires_grad_()
    result = grpo_loss(poisoned, **arguments)
    result.loss.backward()
    assert result.loss.isnan() and result.logp.isnan().tolist() == [False, True, False, False]
    assert (poisoned.grad[1] == 0).all() and torch.equal(poisoned.grad[[0, 2, 3]], clean[[0, 2, 3]])
