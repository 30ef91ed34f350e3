"""verl's fused LM heads, compared with verl's definition in plain PyTorch, in fp64 and bf16."""

from types import SimpleNamespace

import pytest
import torch

from mr1_fast.integrations.verl import FusedLinearForPPO, linear_cross_entropy

T, D = 6, 16
REDUCTIONS = ("none", "sum", "mean")


def definition(hidden, weight, labels, temperature=1.0, reduction="none"):
    """What verl's tests compare its kernels with; on bf16 inputs, verl's own PyTorch version."""
    logits = (hidden.flatten(0, -2) @ weight.T / temperature).to(
        torch.promote_types(hidden.dtype, torch.float32)
    )
    entropy = torch.logsumexp(logits, -1) - (logits.softmax(-1) * logits).sum(-1)
    return -torch.nn.functional.cross_entropy(
        logits, labels.flatten(), reduction=reduction
    ), entropy


def inputs(v: int, shape=(2, T), dtype=torch.float64):
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(*shape, D, generator=generator).to(dtype)
    weight = torch.randn(v, D, generator=generator).to(dtype)
    labels = torch.randint(0, v, shape, generator=generator)
    labels.view(-1)[:2] = torch.tensor([0, v - 1])
    return hidden.requires_grad_(), weight.requires_grad_(), labels


def with_gradients(function, hidden, weight, labels, *rest):
    """Both results, and the gradients of each and of both."""
    outputs = function(hidden, weight, labels, *rest)
    generator = torch.Generator().manual_seed(1)
    incoming = [
        torch.randn(each.shape, generator=generator, dtype=torch.float64).to(each.dtype)
        for each in outputs
    ]
    gradients = []
    for kept in ([0], [1], [0, 1]):
        chosen, by = [outputs[i] for i in kept], [incoming[i] for i in kept]
        gradients += torch.autograd.grad(chosen, [hidden, weight], by, retain_graph=True)
    return *outputs, *gradients


@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("shape", [(2, T), (1, T), (T,)])
@pytest.mark.parametrize("v", [256, 300, 97])
def test_linear_cross_entropy_is_verls(v, shape, reduction):
    arguments = *inputs(v, shape), 1.5, reduction
    expected = with_gradients(definition, *arguments)
    torch.testing.assert_close(
        with_gradients(linear_cross_entropy, *arguments), expected, rtol=1e-9, atol=1e-11
    )


@pytest.mark.parametrize("chunk_size", [4, 512])
@pytest.mark.parametrize("shape", [(2, T), (T,)])
def test_fused_linear_for_ppo_is_verls(shape, chunk_size):
    arguments = *inputs(300, shape), 0.7
    expected = with_gradients(
        lambda *each: [out.view(shape) for out in definition(*each)], *arguments
    )
    ours = with_gradients(FusedLinearForPPO(chunk_size), *arguments)
    torch.testing.assert_close(ours, expected, rtol=1e-9, atol=1e-11)


def test_in_bf16_the_error_is_below_that_of_verls_division_in_bf16():
    hidden, weight, labels = inputs(300, (64,), torch.bfloat16)
    exact = with_gradients(definition, hidden.double(), weight.double(), labels, 0.7)
    theirs = with_gradients(definition, hidden, weight, labels, 0.7)
    for function in (linear_cross_entropy, FusedLinearForPPO()):
        ours = with_gradients(function, hidden, weight, labels, 0.7)
        assert ours[0].dtype == ours[1].dtype == torch.float32
        for value, theirs_too, right in zip(ours[:2], theirs[:2], exact[:2], strict=True):
            assert (value - right).norm() < (theirs_too - right).norm()
        for value, theirs_too, right in zip(ours[2:], theirs[2:], exact[2:], strict=True):
            assert (value - right).norm() <= 1.2 * (theirs_too - right).norm()


def test_logits_of_bf16_hidden_states_are_kept_in_fp32():
    """verl's tests compare log-probs with those of fp32 logits, to 1e-3."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(200, 128, generator=generator).bfloat16()
    weight = (0.5 * torch.randn(1003, 128, generator=generator)).bfloat16()
    labels = torch.randint(0, 1003, (200,), generator=generator)
    exact = definition(hidden.float(), weight.float(), labels)
    rounded = torch.log_softmax((hidden @ weight.T).float(), -1).gather(1, labels[:, None])[:, 0]
    assert (rounded - exact[0]).abs().max() > 1e-2
    for head in (linear_cross_entropy, FusedLinearForPPO(chunk_size=64)):
        for found, expected in zip(head(hidden, weight, labels), exact, strict=True):
            torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-5)


def test_columns_beyond_an_odd_vocabulary_do_not_count():
    hidden, weight, labels = inputs(300)
    hidden, weight = (
        hidden.detach().abs().float(),
        -weight.detach().abs().float(),
    )  # a column of zeros would be likely
    logp, entropy = linear_cross_entropy(hidden, weight, labels)
    torch.testing.assert_close(
        (logp, entropy), definition(hidden, weight, labels), rtol=1e-5, atol=1e-5
    )
    assert (logp <= 0).all() and (logp > -100).all()


def test_a_frozen_weight_has_no_gradient():
    hidden, weight, labels = inputs(97)
    expected = torch.autograd.grad(definition(hidden, weight, labels)[0].sum(), hidden)[0]
    frozen = weight.detach()
    linear_cross_entropy(hidden, frozen, labels, reduction="SUM")[0].backward()
    torch.testing.assert_close(hidden.grad, expected)
    assert frozen.grad is None


def test_what_is_not_supported_says_so():
    arguments = inputs(97)
    with pytest.raises(ValueError, match="reduction is 'max': choose one of none, sum, mean"):
        linear_cross_entropy(*arguments, reduction="max")
    with pytest.raises(ValueError, match="dist_process_group has 2 processes"):
        linear_cross_entropy(*arguments, dist_process_group=SimpleNamespace(size=lambda: 2))
    alone = linear_cross_entropy(*arguments, 1.0, "none", SimpleNamespace(size=lambda: 1))
    torch.testing.assert_close(alone, linear_cross_entropy(*arguments))
