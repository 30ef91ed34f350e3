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
        asked.append([t.numel() > 0 for t in (self.dhidden, self.dweight, self.dbias)])

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


def test_a_16_bit_head_accumulates_its_gradient_in_fp32():
    generator = torch.Generator().manual_seed(0)
    n = 512
    hidden = torch.randn(n, D, generator=generator).bfloat16().requires_grad_()
    weight = torch.randn(V, D, generator=generator).bfloat16().requires_grad_()
    data = loss_rows(n, V, torch.bfloat16, logits=hidden @ weight.T)
    data["advantages"].abs_()
    data["targets"].fill_(5)
    arguments = objective_of(data) | {"beta": 0.0}

    def by_weight(**options) -> torch.Tensor:
        return torch.autograd.grad(
            linear_grpo_loss(hidden, weight, **arguments, **options).loss, weight
        )[0].double()

    exact_leaf = weight.detach().double().requires_grad_()
    loss = whole_logits(hidden.detach().double(), exact_leaf, None, **double(arguments)).loss
    exact = torch.autograd.grad(loss, exact_leaf)[0]
    rounded = torch.zeros_like(weight)
    for start in range(0, n, 4):
        rows = slice(start, start + 4)
        part = {
            name: value[rows] if isinstance(value, torch.Tensor) else value
            for name, value in arguments.items()
        }
        rounded += torch.autograd.grad(linear_grpo_loss(hidden[rows], weight, **part).loss, weight)[
            0
        ]

    def error(gradient: torch.Tensor) -> float:
        return (gradient.double() - exact).abs().max().item()

    chunked = by_weight(chunk_bytes=chunk_bytes(4, torch.bfloat16))
    assert error(chunked) < error(rounded) / 3
    assert error(chunked) <= 2 * error(by_weight())


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
