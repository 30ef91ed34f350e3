"""The operators of torch.ops.mr1_fast as torch.compile sees them."""

import pytest
import torch

from mr1_fast import grpo_loss, linear_grpo_loss, linear_token_logprobs, token_logprobs
from mr1_fast.kernels import linear_grpo_loss as linear
from mr1_fast.kernels import operators

from .loss_data import loss_rows, objective_of

N, D, V = 6, 8, 37
CHUNK_BYTES = 4 * V * 4


def inputs(*, gradient: bool = True):
    generator = torch.Generator().manual_seed(0)
    data = loss_rows(N, V)
    shapes = (N, D), (V, D), (V,)
    hidden, weight, bias = (torch.randn(shape, generator=generator).requires_grad_(gradient) for shape in shapes)
    scalars = torch.tensor(0.1), torch.tensor(0.9)
    per_row = (data[name] for name in ("old_logp", "ref_logp", "is_weights"))
    objective = (
        data["targets"], data["advantages"], data["token_weights"], *scalars, *per_row, "clip",
        [0.2, 0.2, 1.5, 1.0, 1.05], False,
    )  # fmt: skip
    return data["logits"].requires_grad_(gradient), (hidden, weight, bias), objective, scalars[1]


def calls() -> dict[str, tuple]:
    logits, head, objective, temperature = inputs()
    targets, incoming = objective[0], (torch.randn(N), torch.randn(N))
    constant = logits.detach()
    _, *kept = operators.token_logprobs(constant, targets, temperature)
    needs = [True, True, True]
    with torch.no_grad():
        hidden, weight, bias = (t.detach() for t in head)
        _, *linear_kept = linear.linear_token_logprobs(hidden, weight, bias, targets, temperature, CHUNK_BYTES)
    backward = (hidden, weight, bias, targets, temperature, *linear_kept, *incoming, CHUNK_BYTES)
    return {
        "token_logprobs": (operators.token_logprobs, (logits, targets, temperature)),
        "token_logprobs_backward": (
            operators.token_logprobs_backward,
            (constant, targets, temperature, *kept, *incoming),
        ),
        "grpo_loss": (operators.grpo_loss, (logits, *objective, True)),
        "grpo_loss without gradient": (operators.grpo_loss, (constant, *objective, False)),
        "grpo_loss_": (operators.grpo_loss_, (constant.clone(), *objective)),
        "scale_": (operators.scale, (constant.clone(), torch.tensor(3.0))),
        "linear_token_logprobs": (linear.linear_token_logprobs, (*head, targets, temperature, CHUNK_BYTES)),
        "linear_token_logprobs_backward": (linear.linear_token_logprobs_backward, (*backward, needs)),
        "linear_token_logprobs_backward, frozen head": (
            linear.linear_token_logprobs_backward,
            (*backward, [True, False, False]),
        ),
        "linear_grpo_loss": (linear.linear_grpo_loss, (*head, *objective, CHUNK_BYTES, needs)),
        "linear_grpo_loss, no bias, frozen head": (
            linear.linear_grpo_loss,
            (head[0], weight, None, *objective, CHUNK_BYTES, [True, False, False]),
        ),
        "linear_grpo_loss without gradient": (
            linear.linear_grpo_loss,
            (hidden, weight, None, *objective, CHUNK_BYTES, [False] * 3),
        ),
    }


CALLS = list(calls())


@pytest.mark.parametrize("name", CALLS)
def test_operators_keep_the_rules_of_torch_library(name):
    operator, arguments = calls()[name]
    torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("inplace", [False, True])
def test_the_compiled_loss_equals_the_eager_one(inplace):
    data = loss_rows(N, V)
    arguments = objective_of(data, "old_logp", "ref_logp", "is_weights")

    def loss(leaf, beta):
        return grpo_loss(leaf * 1, **arguments, beta=beta, inplace=inplace)

    def run(function):
        leaf = data["logits"].detach().clone().requires_grad_()
        result = function(leaf, torch.tensor(0.1))
        (2 * result.loss).backward()
        return *result, leaf.grad

    for value, expected in zip(run(torch.compile(loss, fullgraph=True, backend="aot_eager")), run(loss), strict=True):
        torch.testing.assert_close(value.detach(), expected.detach())


def test_the_compiled_linear_loss_equals_the_eager_one():
    _, head, _, _ = inputs()
    data = loss_rows(N, V, logits=torch.addmm(head[2], head[0], head[1].T))
    arguments = objective_of(data, "old_logp", "ref_logp", "is_weights")

    def loss(hidden, weight, bias, beta):
        result = linear_grpo_loss(hidden, weight, **arguments, beta=beta, bias=bias, chunk_bytes=CHUNK_BYTES)
        logp, entropy = linear_token_logprobs(hidden, weight, data["targets"], bias=bias, chunk_bytes=CHUNK_BYTES)
        return result.loss + (logp * entropy).sum(), result

    def run(function):
        total, result = function(*head, torch.tensor(0.1))
        return *result, *torch.autograd.grad(total, head)

    for value, expected in zip(run(torch.compile(loss, fullgraph=True, backend="aot_eager")), run(loss), strict=True):
        torch.testing.assert_close(value.detach(), expected.detach())


def test_a_new_beta_or_number_of_rows_compiles_nothing_again():
    frames = []

    def backend(graph, _):
        frames.append(graph)
        return graph.forward

    @torch.compile(fullgraph=True, dynamic=True, backend=backend)
    def loss(logits, arguments, beta):
        return grpo_loss(logits, **arguments, beta=beta).loss

    for n in range(5, 15):
        data = loss_rows(n, V)
        loss(data["logits"].requires_grad_(), objective_of(data, "ref_logp"), torch.tensor(n / 10))
    assert len(frames) == 1


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
