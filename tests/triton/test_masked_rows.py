"""Rows of weight 0 in `token_logprobs`: exactly 0 whatever they hold, and no other row changes."""

import pytest
import torch

from mr1_fast.kernels.grpo import rows_triton

from ..data.loss import MASKS, loss_rows, poisoned, run_logprobs


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
