"""The replacements for TRL's functions on logits and hidden states, compared with TRL's."""

import pytest
import torch

pytest.importorskip("trl")

from trl.kernels import ChunkedLogProbFunction as TRLFunction
from trl.trainer import utils as trl_utils

from mr1_fast import integrations
from mr1_fast.integrations import trl as ours


def leaf(*shape, seed: int = 0):
    return (3 * torch.randn(shape, generator=torch.Generator().manual_seed(seed))).requires_grad_()


@pytest.mark.parametrize("cut", ["whole", "slice", "rows"])
@pytest.mark.parametrize("k", [None, 3])
def test_selective_log_softmax_is_trls(k, cut):
    logits = leaf(3, 5, 131)
    view = {"whole": logits, "slice": logits[:, :-1], "rows": logits.reshape(-1, 131)}[cut]
    shape = view.shape[:-1] + ((k,) if k else ())
    index = torch.randint(0, 131, shape, generator=torch.Generator().manual_seed(1))
    row_mask = torch.arange(view[..., 0].numel()).view(view.shape[:-1]) % 3 > 0
    if k is not None:  # TRL wants the mask in the shape of the index
        row_mask = row_mask.unsqueeze(-1).expand(index.shape)
    for options in ({}, {"temperature": 0.6}, {"row_mask": row_mask}):
        results = []
        for function in (ours.selective_log_softmax, trl_utils.selective_log_softmax):
            value = function(view, index, **options)
            factors = torch.arange(1.0, value.numel() + 1).view(value.shape)
            results.append(
                (value, *torch.autograd.grad((factors * value).sum(), logits, retain_graph=True))
            )
        for mine, theirs in zip(*results, strict=True):
            torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("cut", ["whole", "slice"])
@pytest.mark.parametrize("function", ["selective_log_softmax", "selective_log_softmax_and_entropy"])
def test_masked_rows_may_hold_anything(function, cut):
    function, clean = getattr(ours, function), leaf(3, 5, 131)
    row_mask = torch.arange(15).view(3, 5) % 3 > 0
    index = torch.full((3, 5), 7).masked_fill(~row_mask, -100)
    rubbish = clean.detach().masked_fill(~row_mask[..., None], torch.nan).requires_grad_()
    results = []
    for logits, ids in ((rubbish, index), (clean, index.clamp(min=0))):
        part = slice(None) if cut == "whole" else slice(1, -1)
        arguments = (logits[:, part], ids[:, part])
        value = function(*arguments, temperature=0.6, row_mask=row_mask[:, part])
        value = torch.stack(value) if isinstance(value, tuple) else value
        results.append((value, *torch.autograd.grad(value.square().sum(), logits)))
    assert all(map(torch.equal, *results))
    assert not results[0][1][~row_mask].any()


@pytest.mark.parametrize("cut", ["whole", "slice"])
def test_entropy_is_trls(cut):
    logits = leaf(3, 5, 131)
    view = logits if cut == "whole" else logits[:, 1:-1]
    index = torch.zeros(view.shape[:-1], dtype=torch.int64)
    results = []
    for module in (ours, trl_utils):
        entropy = module.entropy_from_logits(view, chunk_size=4)
        both = module.selective_log_softmax_and_entropy(view, index, True, 0.8, index == 0)
        total = entropy.square().sum() + sum(each.sum() for each in both)
        results.append((entropy, *both, *torch.autograd.grad(total, logits)))
        assert not module.selective_log_softmax_and_entropy(view, index, False)[1].requires_grad
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("scale", [1.0, 0.25])
def test_the_autograd_function_is_trls(scale, with_bias):
    # Logits near 0: TRL's entropy, log Z − E[z], loses digits where those are large.
    leaves = [leaf(11, 8), (0.1 * leaf(131, 8, seed=1)).detach().requires_grad_()]
    leaves.append(leaf(131, seed=2) if with_bias else None)
    targets = torch.randint(0, 131, (11,), generator=torch.Generator().manual_seed(3))
    results = []
    for function in (ours.ChunkedLogProbFunction, TRLFunction):
        logp, entropy, *rest = function.apply(
            *leaves, targets, 0.7, 64, None, scale, ("log_probs", "entropy")
        )
        assert rest == [None] * 3
        total = (logp * targets).sum() + entropy.square().sum()
        results.append(
            (
                logp,
                entropy,
                *torch.autograd.grad(total, [each for each in leaves if each is not None]),
            )
        )
    for mine, theirs in zip(*results, strict=True):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-5 * theirs.abs().max().item())


def test_further_outputs_are_trls_own():
    arguments = (leaf(5, 8), leaf(131, 8, seed=1), None, torch.arange(5), 0.7, 64, 30.0)
    integrations.warn_once.cache_clear()
    with pytest.warns(UserWarning, match="is_top1"):
        results = ours.ChunkedLogProbFunction.apply(*arguments)
    for mine, theirs in zip(results, TRLFunction.apply(*arguments), strict=True):
        assert torch.equal(mine, theirs)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_16_bit_inputs_give_fp32_nearer_to_the_exact_numbers_than_trls(dtype):
    logits, index = leaf(3, 5, 131).detach().to(dtype), torch.arange(15).view(3, 5)
    exact_logp = logits.double().log_softmax(-1)
    exact = (
        exact_logp.gather(-1, index[..., None])[..., 0],
        -(exact_logp.exp() * exact_logp).sum(-1),
    )
    for function in ("selective_log_softmax_and_entropy", "selective_log_softmax"):
        found = getattr(ours, function)(logits, index)
        found = found if isinstance(found, tuple) else (found, ours.entropy_from_logits(logits))
        theirs = trl_utils.selective_log_softmax_and_entropy(logits, index)
        for mine, other, right in zip(found, theirs, exact, strict=True):
            assert mine.dtype == torch.float32
            torch.testing.assert_close(mine.double(), right, rtol=1e-5, atol=1e-5)
            assert (mine - right).norm() < (other - right).norm()
    hidden, weight = leaf(11, 8).to(dtype), leaf(131, 8, seed=1).to(dtype)
    logp, entropy, *_ = ours.ChunkedLogProbFunction.apply(
        hidden, weight, None, torch.arange(11), 1.0, 64, None, 1.0, ("log_probs", "entropy")
    )
    assert logp.dtype == entropy.dtype == torch.float32


def test_no_rows_and_double_precision():
    assert ours.selective_log_softmax(
        torch.empty(0, 5, 131), torch.empty(0, 5, dtype=torch.int64)
    ).shape == (0, 5)
    logits, index = leaf(2, 3, 131).double(), torch.tensor([5, 130]).expand(2, 3, 2)
    exact = logits.log_softmax(-1).gather(-1, index)
    torch.testing.assert_close(
        ours.selective_log_softmax(logits, index), exact, rtol=1e-12, atol=1e-12
    )
