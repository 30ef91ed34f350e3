"""Rows of weight 0 in `token_logprobs` on a CPU: exactly 0 whatever they hold; no other changes.

fp64 runs in PyTorch, what is below in the native kernels where they are built. That masked rows are
not read at all: test_rows_native_memory.py.
"""

import pytest
import torch

from mr1_fast import token_logprobs
from mr1_fast.kernels.grpo import rows_native, rows_torch

from ...data.loss import MASKS, loss_rows, poisoned, run_logprobs
from ...data.native import threads
from .test_rows_native_memory import SPLIT

DTYPES = [torch.float32, torch.bfloat16, torch.float16, torch.float64]


def assert_only_masked_rows_change(data, counts):
    """Assert that masked rows are 0, and the others those of a call without weights."""
    logits, targets = poisoned(data, counts)
    ours = run_logprobs(logits, targets, token_weights=counts)
    for found, expected in zip(ours, run_logprobs(data["logits"], data["targets"]), strict=True):
        assert torch.equal(found[counts], expected[counts])
        assert (found[~counts] == 0).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize(("n", "v"), [(1, 37), (9, 1), (9, 37), (7, 4099)])
@pytest.mark.parametrize("mask", MASKS)
def test_masked_rows_are_zero_and_the_others_as_they_were(mask, n, v, dtype):
    assert_only_masked_rows_change(loss_rows(n, v, dtype), MASKS[mask](n))


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize(("n", "count"), [(1, 7), (3, 7), (20, 3)])
def test_masked_rows_on_several_threads(n, count, mask):
    with threads(count):
        assert_only_masked_rows_change(loss_rows(n, SPLIT if n < 4 else 20011), MASKS[mask](n))


def test_the_kernels_of_pytorch_in_blocks_of_a_few_rows(monkeypatch):
    monkeypatch.setattr(rows_torch, "BLOCK_ELEMENTS", 3 * 37)
    for mask in MASKS.values():
        assert_only_masked_rows_change(loss_rows(11, 37, torch.float64), mask(11))


@pytest.mark.parametrize("dtype", DTYPES[:3], ids=str)
@pytest.mark.parametrize("kernels", [rows_torch, rows_native], ids=["PyTorch", "native"])
def test_what_the_backward_needs_is_finite_and_no_target_is_looked_up(kernels, dtype):
    data = loss_rows(5, 37, dtype)
    if not rows_native.takes(data["logits"]):
        pytest.skip("not built")
    counts = MASKS["every other"](5)
    logits, targets = poisoned(data, counts)
    temperature = torch.tensor(0.8)
    kept = kernels.row_logprobs(logits, targets, temperature, counts.float())
    expected = kernels.row_logprobs(data["logits"], data["targets"], temperature)
    for found, unmasked in zip(kept, expected, strict=True):
        assert torch.equal(found[counts], unmasked[counts]) and (found[~counts] == 0).all()
    gradient = torch.full_like(data["logits"], torch.nan)
    incoming = counts.float(), counts.float()
    kernels.row_logprobs_backward(logits, targets, temperature, *kept[1:], *incoming, gradient)
    assert gradient.isfinite().all() and (gradient[~counts] == 0).all()


@pytest.mark.parametrize("dtype", [torch.bool, torch.int64, torch.bfloat16, torch.float64], ids=str)
def test_weights_of_every_dtype_are_a_mask(dtype):
    data = loss_rows(6, 37)
    weights = torch.tensor([0, 3, -2, 0, 1, 7]).to(dtype)
    found = run_logprobs(data["logits"], data["targets"], token_weights=weights)
    expected = run_logprobs(data["logits"], data["targets"], token_weights=weights != 0)
    assert all(map(torch.equal, found, expected)) and found[0].count_nonzero() == 4


def test_weights_may_be_strided_and_get_no_gradient():
    data = loss_rows(6, 37)
    weights = torch.tensor([[0.0, 1.0]] * 6).requires_grad_()[:, 0]
    logp, entropy = token_logprobs(data["logits"], data["targets"], token_weights=weights)
    assert not logp.any() and not entropy.any() and not logp.requires_grad
