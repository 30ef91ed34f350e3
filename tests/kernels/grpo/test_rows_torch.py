"""The row operations in PyTorch at the edges: what is at a bound, or not finite, has no gradient.

fp64 runs in PyTorch. What is inside of the bounds: test_reference.py.
"""

import math

import pytest
import torch

from mr1_fast import grpo_loss
from mr1_fast.kernels.grpo.objective import KL_LOG_RATIO_LIMIT

from ...data.loss import SURROGATES, loss_rows, objective_of, reference

FAR = KL_LOG_RATIO_LIMIT + 5


def gradient_of(data, **arguments) -> torch.Tensor:
    leaf = data["logits"].detach().clone().requires_grad_()
    return torch.autograd.grad(grpo_loss(leaf, **arguments).loss, leaf)[0]


@pytest.mark.parametrize("bias_corrected_kl", [False, True])
@pytest.mark.parametrize("surrogate", SURROGATES)
@pytest.mark.parametrize("distance", [FAR, -FAR])
def test_a_kl_at_its_bound_has_no_gradient(distance, surrogate, bias_corrected_kl):
    data = loss_rows(20, 37, torch.float64)
    arguments = objective_of(data, "old_logp", "ref_logp", "is_weights") | SURROGATES[surrogate]
    arguments |= {"beta": 0.1, "bias_corrected_kl": bias_corrected_kl}
    inside, _ = reference(data["logits"], **arguments)
    arguments["ref_logp"] = arguments["ref_logp"].clone()
    arguments["ref_logp"][::3] = inside.logp[::3] + distance
    result, expected = reference(data["logits"], **arguments)
    assert torch.equal(result.kl_limited[::3], arguments["token_weights"][::3] != 0)
    found = gradient_of(data, **arguments)
    torch.testing.assert_close(found, expected, rtol=1e-11, atol=1e-13)
    if not bias_corrected_kl:  # else the ratio still moves the bound's KL
        without_kl = gradient_of(data, **arguments | {"beta": 0.0})
        torch.testing.assert_close(found[::3], without_kl[::3], rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("bias_corrected_kl", [False, True])
@pytest.mark.parametrize("surrogate", ["clip", "clip with delta", "sapo"])
def test_a_row_with_an_infinite_ratio_has_no_gradient(surrogate, bias_corrected_kl):
    data = loss_rows(20, 37, torch.float64)
    arguments = objective_of(data, "old_logp", "ref_logp") | SURROGATES[surrogate]
    arguments |= {"beta": 0.1, "bias_corrected_kl": bias_corrected_kl}
    clean = gradient_of(data, **arguments)
    arguments["old_logp"] = arguments["old_logp"].clone()
    arguments["old_logp"][4] = arguments["old_logp"][9] = -math.inf
    arguments["advantages"] = arguments["advantages"].clone()
    arguments["advantages"][4], arguments["advantages"][9] = -1.0, 1.0
    found = gradient_of(data, **arguments)
    assert found.isfinite().all()
    others = [i for i in range(20) if i not in (4, 9)]
    assert torch.equal(found[others], clean[others])
    if bias_corrected_kl or surrogate != "clip with delta":
        assert (found[4] == 0).all()
