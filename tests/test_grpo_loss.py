"""The reference loss against the paper's formula written out with Python numbers, and its gradient in closed form."""

import math

import pytest
import torch

from mr1_fast.kernels.grpo_loss import KL_LOG_RATIO_LIMIT, grpo_loss_ref, token_logprobs_ref
from mr1_fast.loss import spread, token_weights


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


def written_out(data: dict[str, torch.Tensor], beta: float, low: float, high: float) -> tuple[float, list[float]]:
    """Loss and its derivative by each logp, token by token."""
    loss, derivative = 0.0, []
    columns = (data[name].tolist() for name in ("logp", "old_logp", "ref_logp", "advantages", "token_weights"))
    for logp, old, ref, advantage, weight in zip(*columns, strict=True):
        ratio = math.exp(logp - old)
        clipped = min(max(ratio, 1 - low), 1 + high)
        k3 = math.exp(ref - logp) - (ref - logp) - 1
        loss += weight * (-min(ratio * advantage, clipped * advantage) + beta * k3)
        active = ratio * advantage <= clipped * advantage
        derivative.append(weight * (-advantage * ratio * active + beta * (1 - math.exp(ref - logp))))
    return loss, derivative


@pytest.mark.parametrize("beta", [0.0, 0.04, 1.0])
@pytest.mark.parametrize(("low", "high"), [(0.2, 0.2), (0.1, 0.3)])
def test_is_the_papers_formula(beta, low, high):
    data = rows()
    expected, derivative = written_out(data, beta, low, high)
    logp = data["logp"].requires_grad_()
    result = grpo_loss_ref(**data, beta=torch.tensor(beta, dtype=torch.float64), clip_low=low, clip_high=high)
    result.loss.backward()
    assert result.loss.item() == pytest.approx(expected, rel=1e-12)
    torch.testing.assert_close(logp.grad, torch.tensor(derivative, dtype=torch.float64))
    no_gradient = [d == pytest.approx(0) for d in written_out(data | {"logp": data["logp"].detach()}, 0, low, high)[1]]
    assert result.clipped.tolist() == no_gradient, "clipped marks the tokens whose surrogate has no gradient"
    assert (result.kl >= 0).all()


def test_on_policy_is_a_ratio_of_one_with_its_gradient():
    data = rows()
    logp = data["logp"].requires_grad_()
    result = grpo_loss_ref(logp, data["advantages"], data["token_weights"], beta=0.0)
    result.loss.backward()
    torch.testing.assert_close(logp.grad, -data["token_weights"] * data["advantages"])
    assert not result.clipped.any()


@pytest.mark.parametrize("poison", [math.inf, -math.inf, math.nan])
def test_a_token_of_weight_zero_contributes_exactly_zero(poison):
    data = rows(6)
    data["token_weights"][2] = 0
    clean = grpo_loss_ref(**data, beta=0.1)
    for name in ("logp", "old_logp", "ref_logp"):
        poisoned = dict(data)
        poisoned[name] = data[name].clone()
        poisoned[name][2] = poison
        poisoned["logp"] = poisoned["logp"].clone().requires_grad_()
        result = grpo_loss_ref(**poisoned, beta=0.1)
        result.loss.backward()
        assert result.loss.item() == clean.loss.item()
        assert poisoned["logp"].grad[2] == 0
        assert poisoned["logp"].grad.isfinite().all()


def test_k3_is_bounded_and_says_so():
    zeros, ones = torch.zeros(2), torch.ones(2)
    logp = torch.tensor([-1000.0, -1.0], requires_grad=True)
    result = grpo_loss_ref(logp, zeros, ones, beta=0.1, ref_logp=torch.tensor([-1.0, -1.5]))
    result.loss.backward()
    assert result.kl_limited.tolist() == [True, False]
    assert result.kl[0].item() == pytest.approx(math.exp(KL_LOG_RATIO_LIMIT) - KL_LOG_RATIO_LIMIT - 1)
    assert logp.grad.isfinite().all()


def test_a_reference_is_needed_only_for_kl():
    data = rows(3)
    del data["ref_logp"]
    assert grpo_loss_ref(**data, beta=0.0).kl.tolist() == [0, 0, 0]
    with pytest.raises(ValueError, match="ref_logp"):
        grpo_loss_ref(**data, beta=0.04)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_logprobs_are_as_exact_as_the_logits_allow(dtype):
    generator = torch.Generator().manual_seed(0)
    logits = (5 * torch.randn(7, 4099, generator=generator)).to(dtype)
    targets = torch.tensor([0, 4098, 5, 77, 1234, 2, 3])
    exact = torch.log_softmax(logits.double() / 0.6, -1)
    logp, entropy = token_logprobs_ref(logits, targets, temperature=0.6)
    assert logp.dtype == entropy.dtype == torch.float32
    torch.testing.assert_close(logp.double(), exact[range(7), targets], rtol=0, atol=1e-5)
    torch.testing.assert_close(entropy.double(), -(exact.exp() * exact).sum(-1), rtol=0, atol=1e-5)


def test_entropy_with_banned_tokens_is_finite():
    logits = torch.tensor([[0.0, 0.0, -math.inf]])
    logp, entropy = token_logprobs_ref(logits, torch.tensor([0]))
    assert logp.item() == entropy.item() * -1 == pytest.approx(-math.log(2))


def test_token_weights_are_a_mean_of_means():
    cu_seqlens = torch.tensor([0, 2, 2, 5])
    weights = token_weights(cu_seqlens, num_sequences=3)
    torch.testing.assert_close(weights, torch.tensor([1 / 6, 1 / 6, 1 / 9, 1 / 9, 1 / 9]))
    assert spread(torch.tensor([7.0, 8.0, 9.0]), cu_seqlens).tolist() == [7, 7, 9, 9, 9]
