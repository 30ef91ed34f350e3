"""The operators of torch.ops.mr1_fast, by the rules of torch.library.

What torch.compile makes of them is tested in tests/loss/test_compile.py.
"""

import pytest
import torch

from mr1_fast import grpo_loss, linear_grpo_loss, token_logprobs
from mr1_fast.kernels.grpo import linear, operators
from mr1_fast.kernels.grpo.objective import Objective

from ...data.loss import loss_rows, objective_of

N, D, V = 6, 8, 37
CHUNK_BYTES = 4 * V * 4


def inputs(*, gradient: bool = True):
    generator = torch.Generator().manual_seed(0)
    data = loss_rows(N, V)
    shapes = (N, D), (V, D), (V,)
    hidden, weight, bias = (
        torch.randn(shape, generator=generator).requires_grad_(gradient) for shape in shapes
    )
    objective = Objective(
        advantages=data["advantages"],
        token_weights=data["token_weights"],
        beta=torch.tensor(0.1),
        temperature=torch.tensor(0.9),
        old_logp=data["old_logp"],
        ref_logp=data["ref_logp"],
        is_weights=data["is_weights"],
        delta=1.5,
    )
    logits = data["logits"].requires_grad_(gradient)
    return logits, (hidden, weight, bias), data["targets"], objective


def calls() -> dict[str, tuple]:
    logits, head, targets, objective = inputs()
    temperature, incoming = objective.temperature, (torch.randn(N), torch.randn(N))
    constant = logits.detach()
    _, *kept = operators.token_logprobs(constant, targets, temperature)
    needs = [True, True, True]
    with torch.no_grad():
        hidden, weight, bias = (t.detach() for t in head)
        _, *linear_kept = linear.linear_token_logprobs(
            hidden, weight, bias, targets, temperature, CHUNK_BYTES
        )
    backward = (hidden, weight, bias, targets, temperature, *linear_kept, *incoming, CHUNK_BYTES)
    return {
        "token_logprobs": (operators.token_logprobs, (logits, targets, temperature)),
        "token_logprobs, weighted": (
            operators.token_logprobs,
            (logits, targets, temperature, objective.token_weights),
        ),
        "token_logprobs_backward": (
            operators.token_logprobs_backward,
            (constant, targets, temperature, *kept, *incoming),
        ),
        "grpo_loss": (operators.grpo_loss, (logits, targets, True, *objective)),
        "grpo_loss without gradient": (
            operators.grpo_loss,
            (constant, targets, False, *objective),
        ),
        "grpo_loss_": (operators.grpo_loss_, (constant.clone(), targets, *objective)),
        "scale_": (operators.scale, (constant.clone(), torch.tensor(3.0))),
        "linear_token_logprobs": (
            linear.linear_token_logprobs,
            (*head, targets, temperature, CHUNK_BYTES, False),
        ),
        "linear_token_logprobs_backward": (
            linear.linear_token_logprobs_backward,
            (*backward, False, needs),
        ),
        "linear_token_logprobs_backward, frozen head": (
            linear.linear_token_logprobs_backward,
            (*backward, True, [True, False, False]),
        ),
        "linear_grpo_loss": (
            linear.linear_grpo_loss,
            (*head, targets, CHUNK_BYTES, needs, None, *objective),
        ),
        "linear_grpo_loss, no bias, frozen head": (
            linear.linear_grpo_loss,
            (head[0], weight, None, targets, CHUNK_BYTES, [True, False, False], None, *objective),
        ),
        "linear_grpo_loss without gradient": (
            linear.linear_grpo_loss,
            (hidden, weight, None, targets, CHUNK_BYTES, [False] * 3, True, *objective),
        ),
        "linear_grpo_loss_": (
            linear.linear_grpo_loss_,
            (
                *(hidden, weight, bias, targets, torch.randn_like(weight)),
                *(CHUNK_BYTES, needs, False, *objective),
            ),
        ),
        "require_one_": (linear.require_one, (torch.randn_like(weight), torch.tensor(1.0))),
    }


CALLS = list(calls())


@pytest.mark.parametrize("name", CALLS)
def test_operators_keep_the_rules_of_torch_library(name):
    operator, arguments = calls()[name]
    torch.library.opcheck(operator, arguments)


def test_the_gradient_is_no_longer_part_of_a_graph():
    logits, (hidden, weight, _), _, _ = inputs()
    data = loss_rows(N, V)
    arguments = objective_of(data) | {"beta": 0.0}
    gradients = [
        *torch.autograd.grad(grpo_loss(logits, **arguments).loss, logits),
        *torch.autograd.grad(grpo_loss(logits * 1, **arguments, inplace=True).loss, logits),
        *torch.autograd.grad(linear_grpo_loss(hidden, weight, **arguments).loss, (hidden, weight)),
        *torch.autograd.grad(token_logprobs(logits, data["targets"])[0].sum(), logits),
    ]
    assert [gradient.requires_grad for gradient in gradients] == [False] * 5
