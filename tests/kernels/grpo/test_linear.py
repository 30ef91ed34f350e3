"""The loss with the projection fused in, against autograd through whole logits.

It is taken in chunks, with parts of the head frozen, and under autocast.
"""

import pytest
import torch

from mr1_fast import linear_grpo_loss, linear_token_logprobs
from mr1_fast.kernels.grpo import linear
from mr1_fast.kernels.grpo.reference import grpo_loss_ref, token_logprobs_ref

from ...data.loss import SURROGATES, double, loss_rows, objective_of

N, D, V = 20, 8, 37
CU_SEQLENS = torch.tensor([0, 0, 7, 8, 8, 20])


def head(dtype=torch.float64, seed: int = 0):
    """(hidden, weight, bias) that require gradients, and rows that fit their logits."""
    generator = torch.Generator().manual_seed(seed)
    leaves = [torch.randn(shape, generator=generator).to(dtype) for shape in [(N, D), (V, D), (V,)]]
    data = loss_rows(
        N, V, dtype, logits=torch.addmm(leaves[2], leaves[0], leaves[1].T), temperature=0.8
    )
    return [leaf.requires_grad_() for leaf in leaves], data


def whole_logits(hidden, weight, bias, **arguments):
    logits = hidden @ weight.T if bias is None else torch.addmm(bias, hidden, weight.T)
    return grpo_loss_ref(logits, **arguments)


def fused(hidden, weight, bias, **arguments):
    return linear_grpo_loss(hidden, weight, bias=bias, **arguments)


def run(function, leaves, **arguments):
    result = function(*leaves, **arguments)
    leaves = [leaf for leaf in leaves if leaf is not None]
    return *result, *torch.autograd.grad(2 * result.loss, leaves)


def chunk_bytes(rows: int, dtype=torch.float64) -> int:
    return rows * V * dtype.itemsize


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("rows", [1, 7, 1000])
@pytest.mark.parametrize("surrogate", SURROGATES)
def test_equals_autograd_through_whole_logits(surrogate, rows, with_bias):
    leaves, data = head()
    leaves[2] = leaves[2] if with_bias else None
    arguments = objective_of(data, "old_logp", "ref_logp", "is_weights") | SURROGATES[surrogate]
    arguments |= {"beta": 0.1, "temperature": 0.8}
    expected = run(whole_logits, leaves, **arguments)
    for value, right in zip(
        run(fused, leaves, **arguments, chunk_bytes=chunk_bytes(rows)), expected, strict=True
    ):
        torch.testing.assert_close(value, right, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("surrogate", SURROGATES)
def test_ratio_per_sequence_equals_autograd_through_whole_logits(surrogate):
    leaves, data = head()
    arguments = objective_of(data, "old_logp", "ref_logp", "is_weights") | SURROGATES[surrogate]
    arguments |= {
        "beta": 0.1,
        "temperature": 0.8,
        "ratio_level": "sequence",
        "cu_seqlens": CU_SEQLENS,
    }
    expected = run(whole_logits, leaves, **arguments)
    for value, right in zip(
        run(fused, leaves, **arguments, chunk_bytes=chunk_bytes(6)), expected, strict=True
    ):
        torch.testing.assert_close(value, right, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rows", [3, 1000])
def test_log_probs_and_entropy_have_autograds_gradients(rows):
    leaves, data = head()
    factors = data["advantages"], data["is_weights"] - 1

    def gradients(logp, entropy):
        return torch.autograd.grad((factors[0] * logp + factors[1] * entropy).sum(), leaves)

    hidden, weight, bias = leaves
    whole = token_logprobs_ref(torch.addmm(bias, hidden, weight.T), data["targets"], 0.8)
    ours = linear_token_logprobs(
        hidden,
        weight,
        data["targets"],
        torch.tensor(0.8, dtype=torch.float64),
        bias,
        chunk_bytes=chunk_bytes(rows),
    )
    for value, right in zip((*ours, *gradients(*ours)), (*whole, *gradients(*whole)), strict=True):
        torch.testing.assert_close(value, right, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("rows", [3, 1000])
def test_wide_logits_of_16_bit_inputs_keep_all_digits(rows):
    leaves, data = head()
    leaves = [leaf.detach().bfloat16().requires_grad_() for leaf in leaves]
    exact = [leaf.detach().double().requires_grad_() for leaf in leaves]
    factors = data["advantages"], data["is_weights"] - 1
    hidden, weight, bias = exact
    whole = token_logprobs_ref(torch.addmm(bias, hidden, weight.T), data["targets"])
    budget = chunk_bytes(rows, torch.float32)
    hidden, weight, bias = leaves
    ours = linear_token_logprobs(
        hidden, weight, data["targets"], 1.0, bias, chunk_bytes=budget, wide_logits=True
    )
    for value, right in zip(ours, whole, strict=True):
        torch.testing.assert_close(value.double(), right, rtol=1e-6, atol=1e-5)
    gradients = (
        torch.autograd.grad((factors[0] * logp + factors[1] * entropy).sum(), each)
        for (logp, entropy), each in ((ours, leaves), (whole, exact))
    )
    for value, right in zip(*gradients, strict=True):
        assert (value - right).norm() < 5e-3 * right.norm()  # a bf16 number has 4e-3


@pytest.mark.parametrize(
    "trainable", [(True, False, False), (False, True, False), (False, False, True)]
)
def test_only_what_is_trained_gets_a_gradient(trainable, monkeypatch):
    leaves, data = head()
    arguments = objective_of(data) | {"beta": 0.0, "chunk_bytes": chunk_bytes(6)}
    expected = run(fused, leaves, **arguments)[-3:]
    asked = []
    constructor = linear.Head.__init__

    def remember(self, *args):
        constructor(self, *args)
        asked.append([t.numel() > 0 for t in (self.dhidden, self.sum, self.dbias)])

    monkeypatch.setattr(linear.Head, "__init__", remember)
    for leaf, need in zip(leaves, trainable, strict=True):
        leaf.requires_grad_(need)
    fused(*leaves, **arguments).loss.backward()
    logp, entropy = linear_token_logprobs(*leaves[:2], data["targets"], bias=leaves[2])
    (logp + entropy).sum().backward()
    assert asked == [list(trainable), [False] * 3, list(trainable)], (
        "memory of the loss, of log-probs, of their backward"
    )
    assert [leaf.grad is not None for leaf in leaves] == list(trainable)
    with torch.no_grad():
        fused(*leaves, **arguments)
    assert asked[-1] == [False] * 3
    for leaf, right, need in zip(leaves, expected, trainable, strict=True):
        if need:
            leaf.grad = None
            (2 * fused(*leaves, **arguments).loss).backward()
            torch.testing.assert_close(leaf.grad, right)


def test_over_many_chunks_a_16_bit_head_sums_its_gradient_in_fp32():
    """Where all rows add to it with one sign, a sum in bf16 would stand still."""
    n, dtype = 512, torch.bfloat16
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(n, D, generator=generator).to(dtype).requires_grad_()
    weight = torch.randn(V, D, generator=generator).to(dtype).requires_grad_()
    data = loss_rows(n, V, dtype, logits=hidden @ weight.T)
    data["advantages"].abs_()
    data["targets"].fill_(5)
    arguments = objective_of(data) | {"beta": 0.0}

    def of(rows: int, **options) -> torch.Tensor:
        options["chunk_bytes"] = chunk_bytes(rows, dtype)
        loss = fused(hidden, weight, None, **arguments, **options).loss
        return torch.autograd.grad(loss, weight)[0].double()

    leaf = weight.detach().double().requires_grad_()
    loss = whole_logits(hidden.detach().double(), leaf, None, **double(arguments)).loss
    exact = torch.autograd.grad(loss, leaf)[0]
    error = lambda gradient: (gradient - exact).abs().max().item()  # noqa: E731
    assert error(of(4)) < error(of(4, fp32_accumulation=False)) / 3
    assert error(of(4)) <= 2 * error(of(n))
    assert torch.equal(of(4), of(4, fp32_accumulation=True))
    assert torch.equal(of(64), of(64, fp32_accumulation=False)), "8 chunks are few"


# --- the weight's gradient in a given tensor ----------------------------------------------------


@pytest.mark.parametrize("with_bias", [True, False])
@pytest.mark.parametrize("rows", [7, 1000])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_gradient_is_added_to_a_given_tensor(dtype, rows, with_bias):
    leaves, data = head(dtype)
    leaves[2] = leaves[2] if with_bias else None
    arguments = objective_of(data, "old_logp") | {"beta": 0.0}
    arguments["chunk_bytes"] = chunk_bytes(rows, dtype)
    trained = [leaf for leaf in leaves if leaf is not None]
    result = fused(*leaves, **arguments)
    dhidden, dweight, *dbias = torch.autograd.grad(result.loss, trained)
    for wide in dict.fromkeys([dtype, torch.promote_types(dtype, torch.float32)]):
        before = torch.randn(V, D).to(wide)
        weight_grad = before.clone()
        ours = fused(*leaves, **arguments, weight_grad=weight_grad)
        expected = before + dweight
        bound = dict(rtol=1e-2, atol=1e-2) if dtype == torch.bfloat16 else dict(rtol=1e-10, atol=0)
        torch.testing.assert_close(weight_grad, expected.to(wide), **bound)
        for value, right in zip(ours, result, strict=True):
            assert torch.equal(value, right)
        ours = torch.autograd.grad(ours.loss, trained, allow_unused=True)
        assert torch.equal(ours[0], dhidden) and ours[1] is None
        assert not with_bias or torch.equal(ours[2], dbias[0])


def test_losses_of_several_packs_add_to_the_weights_own_gradient():
    leaves, data = head()
    arguments = objective_of(data) | {"beta": 0.0}
    once = run(fused, leaves, **arguments)[-2]
    leaves[1].grad = torch.zeros_like(leaves[1])
    losses = [fused(*leaves, **arguments, weight_grad=leaves[1].grad).loss for _ in range(2)]
    sum(losses).backward()
    torch.testing.assert_close(leaves[1].grad, once)  # `run` asks for that of twice the loss
    with torch.no_grad():
        fused(*leaves, **arguments, weight_grad=leaves[1].grad)
    torch.testing.assert_close(leaves[1].grad, once)


def test_a_factor_that_comes_too_late_does_not_pass_unseen():
    leaves, data = head(torch.float32)
    arguments = objective_of(data) | {"beta": 0.0, "weight_grad": torch.zeros(V, D)}
    loss = fused(*leaves, **arguments).loss
    with pytest.raises(RuntimeError, match=r"gradient of 0\.5, .*put factors into token_weights"):
        (0.5 * loss).backward()
    for factor, finite in ((1.0, True), (0.5, False)):  # on a GPU, where nothing is read
        linear.nan_unless_one_(arguments["weight_grad"], torch.tensor(factor))
        assert arguments["weight_grad"].isfinite().all() == finite
    assert finite or arguments["weight_grad"].isnan().all()


@pytest.mark.parametrize("loss_rows_per_chunk", [6, 1000])
def test_autocast_runs_the_products_in_its_dtype(loss_rows_per_chunk):
    leaves, data = head(torch.float32)
    arguments = objective_of(data, "old_logp", "ref_logp") | {"beta": 0.1}
    arguments["chunk_bytes"] = chunk_bytes(loss_rows_per_chunk, torch.bfloat16)
    in_bf16 = [leaf.detach().bfloat16().requires_grad_() for leaf in leaves]
    expected = run(fused, in_bf16, **arguments)
    with torch.autocast("cpu", torch.bfloat16):
        results = run(fused, leaves, **arguments)
    assert results[0].dtype == torch.float32
    assert [gradient.dtype for gradient in results[-3:]] == [torch.float32] * 3
    for value, right in zip(results, expected, strict=True):
        assert torch.equal(value, right.to(value.dtype))


@pytest.mark.parametrize("name", ["advantages", "is_weights"])
def test_values_per_sequence_equal_values_per_token(name):
    leaves, data = head()
    lengths = CU_SEQLENS.diff()
    values = torch.linspace(-1, 2, len(lengths))
    arguments = objective_of(data, "old_logp") | {"beta": 0.0}
    per_token = run(fused, leaves, **arguments | {name: values.repeat_interleave(lengths)})
    per_sequence = run(fused, leaves, **arguments | {name: values}, cu_seqlens=CU_SEQLENS)
    for value, right in zip(per_sequence, per_token, strict=True):
        assert torch.equal(value, right)


def test_beta_and_temperature_may_be_tensors():
    leaves, data = head()
    arguments = objective_of(data, "old_logp", "ref_logp")
    floats = run(fused, leaves, **arguments, beta=0.25, temperature=0.5)
    tensors = run(
        fused, leaves, **arguments, beta=torch.tensor(0.25), temperature=torch.tensor([0.5])
    )
    for value, right in zip(tensors, floats, strict=True):
        assert torch.equal(value, right)


def test_no_rows():
    leaves, data = head()
    empty = {name: value[:0] for name, value in objective_of(data, "ref_logp").items()}
    result = fused(leaves[0][:0], *leaves[1:], **empty, beta=0.1)
    result.loss.backward()
    assert result.loss.item() == 0
    assert [leaf.grad.abs().sum().item() for leaf in leaves] == [0, 0, 0]


def test_a_second_backward_is_refused():
    leaves, data = head()
    result = fused(*leaves, **objective_of(data), beta=0.0)
    result.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError):
        result.loss.backward()
