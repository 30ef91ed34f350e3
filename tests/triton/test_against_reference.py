"""Every public function on the Triton kernels against fp64.

Its error is at most twice that of eager PyTorch in the same dtype.
"""

import pytest
import torch

from mr1_fast import grpo_loss, linear_grpo_loss, linear_token_logprobs, token_logprobs
from mr1_fast.kernels.dispatch import use_triton
from mr1_fast.kernels.grpo.reference import grpo_loss_ref, token_logprobs_ref

from ..data.loss import (
    EPSILON,
    SURROGATES,
    assert_results_within_bound,
    assert_within_bound,
    double,
    logprobs_and_gradients,
    loss_rows,
    objective_of,
    reference,
)

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
OPTIONS = {
    "on-policy": ((), {"beta": 0.0}),
    "off-policy with everything": (("old_logp", "ref_logp", "is_weights"), {"beta": 0.1}),
    "bias-corrected KL": (("old_logp", "ref_logp"), {"beta": 0.1, "bias_corrected_kl": True}),
}


def ours(logits, **arguments):
    """(results of grpo_loss, gradient by the logits)."""
    logits = logits.detach().clone().requires_grad_()
    result = grpo_loss(logits, **arguments)
    result.loss.backward()
    return result, logits.grad


def assert_matches_fp64(logits, **arguments):
    result, gradient = ours(logits, **arguments)
    exact, exact_gradient = reference(logits.double(), **double(arguments))
    eager, eager_gradient = reference(logits, **arguments)
    assert gradient.dtype == logits.dtype
    derivatives = exact_gradient.abs().amax(1).sum().item() if exact_gradient.numel() else 0.0
    assert_results_within_bound(result, eager, exact, derivatives)
    assert_within_bound(gradient, eager_gradient, exact_gradient, "gradient")


def test_these_tests_run_the_triton_kernels(device):
    assert use_triton(torch.zeros(1, 1, device=device))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("options", OPTIONS)
@pytest.mark.parametrize(
    ("v", "surrogate"),
    # A token's loss does not depend on how many blocks its row has: one surrogate for long rows.
    [*((37, surrogate) for surrogate in SURROGATES), (4099, "clip")],
)
def test_loss_and_gradient(device, v, surrogate, options, dtype):
    optional, settings = OPTIONS[options]
    data = loss_rows(12, v, dtype, device)
    assert_matches_fp64(
        data["logits"], **objective_of(data, *optional), **SURROGATES[surrogate], **settings
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v", [151936, 152064])
def test_loss_and_gradient_over_real_vocabularies(device, v, dtype):
    data = loss_rows(3, v, dtype, device)
    assert_matches_fp64(
        data["logits"], **objective_of(data, "old_logp", "ref_logp"), beta=0.1, temperature=0.9
    )


@pytest.mark.parametrize("v", [1, 2, 3, 16, 17, 129])
def test_loss_and_gradient_over_tiny_vocabularies(device, v):
    data = loss_rows(4, v, device=device)
    assert_matches_fp64(data["logits"], **objective_of(data, "old_logp", "ref_logp"), beta=0.1)


@pytest.mark.parametrize("temperature", [0.6, 1.7, torch.tensor(0.6)], ids=["0.6", "1.7", "tensor"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_temperature(device, dtype, temperature):
    data = loss_rows(6, 97, dtype, device, temperature=float(temperature))
    if isinstance(temperature, torch.Tensor):
        temperature = temperature.to(device)
    assert_matches_fp64(
        data["logits"], **objective_of(data, "ref_logp"), beta=0.1, temperature=temperature
    )


def test_one_row(device):
    data = loss_rows(1, 37, device=device)
    assert_matches_fp64(data["logits"], **objective_of(data, "old_logp", "ref_logp"), beta=0.1)


@pytest.mark.parametrize("inplace", [False, True])
def test_no_rows(device, inplace):
    data = loss_rows(0, 37, device=device)
    leaf = data["logits"].requires_grad_()
    result = grpo_loss(leaf * 1, **objective_of(data, "ref_logp"), beta=0.1, inplace=inplace)
    (3 * result.loss).backward()
    assert result.loss.item() == 0
    assert leaf.grad.shape == (0, 37)
    assert all(value.shape == (0,) for value in result[1:])
    logp, entropy = token_logprobs(leaf, data["targets"])
    (logp + entropy).sum().backward()
    assert logp.shape == entropy.shape == (0,)


@pytest.mark.parametrize("surrogate", ["clip", "cispo", "sapo"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_ratio_per_sequence(device, dtype, surrogate):
    data = loss_rows(12, 37, dtype, device)
    cu_seqlens = torch.tensor([0, 0, 4, 5, 5, 12, 12], device=device)
    arguments = objective_of(data, "old_logp", "ref_logp") | {"surrogate": surrogate, "beta": 0.1}
    assert_matches_fp64(data["logits"], **arguments, ratio_level="sequence", cu_seqlens=cu_seqlens)


def test_per_sequence_advantages_with_empty_sequences(device):
    data = loss_rows(7, 37, device=device)
    cu_seqlens = torch.tensor([0, 0, 3, 3, 7, 7], dtype=torch.int32, device=device)
    lengths = torch.tensor([0, 3, 0, 4, 0], device=device)
    values = torch.tensor([9.0, -1.0, 9.0, 0.5, 9.0], device=device)
    arguments = objective_of(data, "old_logp")
    for name in ("advantages", "is_weights"):
        per_token = ours(
            data["logits"], **arguments | {name: values.repeat_interleave(lengths)}, beta=0.0
        )
        per_sequence = ours(
            data["logits"], **arguments | {name: values}, beta=0.0, cu_seqlens=cu_seqlens
        )
        assert torch.equal(per_token[1], per_sequence[1])
        assert per_token[0].loss.item() == per_sequence[0].loss.item()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("v", [37, 4099, 151936])
def test_token_logprobs_and_their_gradients(device, v, dtype):
    data = loss_rows(4, v, dtype, device)
    incoming = (
        torch.tensor([1.0, -0.5, 0.0, 2.0], device=device),
        torch.tensor([0.3, -1.5, 0.0, 0.0], device=device),
    )

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
        assert_within_bound(*values, name, scale=1.0 if name == "entropy" else 0.0)
    assert (results[3][2] == 0).all(), "a row without incoming gradient"


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("chunk_rows", [3, 100])
def test_linear_forms(device, chunk_rows, dtype):
    n, d, v = 11, 16, 521
    generator = torch.Generator().manual_seed(1)
    leaves = [
        torch.randn(shape, generator=generator).to(dtype).to(device)
        for shape in [(n, d), (v, d), (v,)]
    ]
    data = loss_rows(n, v, dtype, device, logits=torch.addmm(leaves[2], leaves[0], leaves[1].T))
    objective = objective_of(data, "old_logp", "ref_logp", "is_weights") | {"beta": 0.1}
    chunk_bytes = chunk_rows * v * leaves[0].element_size()

    def head(function):
        def run(hidden, weight, bias, targets, *rest, **arguments):
            return function(torch.addmm(bias, hidden, weight.T), targets, *rest, **arguments)

        return run

    def fused(function):
        def run(hidden, weight, bias, targets, *rest, **arguments):
            return function(
                hidden, weight, targets, *rest, bias=bias, **arguments, chunk_bytes=chunk_bytes
            )

        return run

    def run_loss(function, leaves, objective):
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        result = function(*leaves, **objective)
        return result, torch.autograd.grad(result.loss, leaves)

    def run_logprobs(function, leaves, _):
        leaves = [leaf.detach().requires_grad_() for leaf in leaves]
        logp, entropy = function(*leaves, data["targets"], 0.8)
        return (logp, entropy), torch.autograd.grad((logp * 0.3 + entropy).sum(), leaves)

    result, gradients = run_loss(fused(linear_grpo_loss), leaves, objective)
    eager, eager_gradients = run_loss(head(grpo_loss_ref), leaves, objective)
    exact, exact_gradients = run_loss(
        head(grpo_loss_ref), double(dict(enumerate(leaves))).values(), double(objective)
    )
    for name in ("loss", "logp", "entropy", "kl"):
        assert_within_bound(
            getattr(result, name), getattr(eager, name), getattr(exact, name), name, scale=20.0
        )
    names = ("dhidden", "dweight", "dbias")
    for name, *values in zip(names, gradients, eager_gradients, exact_gradients, strict=True):
        assert_within_bound(*values, name)

    result, gradients = run_logprobs(fused(linear_token_logprobs), leaves, None)
    eager, eager_gradients = run_logprobs(head(token_logprobs_ref), leaves, None)
    exact, exact_gradients = run_logprobs(
        head(token_logprobs_ref), double(dict(enumerate(leaves))).values(), None
    )
    for name, *values in zip(("logp", "entropy"), result, eager, exact, strict=True):
        assert_within_bound(*values, name, scale=20.0)
    for name, *values in zip(names, gradients, eager_gradients, exact_gradients, strict=True):
        assert_within_bound(*values, f"{name} of log-probs")


def test_k3_of_small_log_ratios_keeps_its_digits(device):
    n = 64
    data = loss_rows(n, 37, device=device)
    logp = token_logprobs(data["logits"], data["targets"])[0]
    distances = torch.logspace(-3, -2, n, device=device) * torch.tensor(
        [1.0, -1.0], device=device
    ).repeat(n // 2)
    ref_logp = logp + distances
    data["token_weights"].fill_(1)
    result = grpo_loss(data["logits"], **objective_of(data), ref_logp=ref_logp, beta=0.1)
    d = ref_logp - result.logp
    exact = torch.expm1(ref_logp.double() - result.logp.double()) - (
        ref_logp.double() - result.logp.double()
    )

    def worst(kl: torch.Tensor) -> float:
        return ((kl.double() - exact) / exact).abs().max().item()

    # A GPU's compiler may fuse logp's last product into the difference: it is then off by a
    # rounding of logp
    fused = 2 * EPSILON * result.logp.abs().max().item() / 1e-3 if device == "cuda" else 0.0
    assert worst(result.kl) <= 2 * worst(torch.expm1(d) - d) + 8 * EPSILON + fused
    assert worst(result.kl) < 0.1 * worst(torch.exp(d) - d - 1)
