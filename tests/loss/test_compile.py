"""torch.compile with fullgraph: the numbers of eager, and how often a training run compiles.

A schedule's β may be a Python float. By default torch takes floats and lengths for constants until
they change: the second call may compile once more, all later ones do not. With dynamic=True there
is one compilation, and so there is by default where β and temperature are 0-d tensors and lengths
stay. Bounds of ρ and names of surrogates are constants.
"""

import pytest
import torch
from torch._dynamo.utils import counters

from mr1_fast import (
    grpo_loss,
    linear_grpo_loss,
    linear_token_logprobs,
    token_logprobs,
    token_weights,
)

from ..data.head import batch, loss_of, text_model
from ..data.loss import SURROGATES, loss_rows
from ..kernels.grpo.test_operators import CALLS
from ..kernels.layers.test_operators import NAMES as LAYERS

N, D, V = 12, 8, 37
CU_SEQLENS = torch.tensor([0, 3, 3, 8, N])
COMMON = {"beta": 0.1, "temperature": 0.9}
SEQUENCES = {
    "cu_seqlens": CU_SEQLENS,
    "is_weights": torch.tensor([0.5, 1.0, 1.5, 0.2]),
    "advantages": torch.tensor([1.0, 0.3, -0.7, 0.4]),
}
OPTIONS = {
    **SURROGATES,
    **{
        f"{name}, per sequence": each | SEQUENCES | {"ratio_level": "sequence"}
        for name, each in SURROGATES.items()
    },
    "advantages and is_weights per sequence": SEQUENCES,
    "on-policy, no reference": {
        "old_logp": None,
        "ref_logp": None,
        "is_weights": None,
        "beta": 0.0,
    },
    "bias-corrected KL": {"bias_corrected_kl": True},
    "inplace": {"inplace": True},
}
TOLERANCE = dict(rtol=1e-4, atol=1e-4)


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def inputs(n: int = N) -> tuple[list[torch.Tensor], dict[str, torch.Tensor]]:
    """(hidden, weight, bias), leaves; the per-row inputs of the loss for their logits."""
    generator = torch.Generator().manual_seed(0)
    leaves = [torch.randn(shape, generator=generator) for shape in ((n, D), (V, D), (V,))]
    data = loss_rows(n, V, logits=torch.addmm(leaves[2], leaves[0], leaves[1].T))
    del data["logits"]
    return [leaf.requires_grad_() for leaf in leaves], data


def run(function, leaves, *arguments):
    """What the function returns, and the gradients of the first of it."""
    outputs = function(*leaves, *arguments)
    trained = [leaf for leaf in leaves if leaf is not None and leaf.requires_grad]
    return outputs, torch.autograd.grad(outputs[0], trained)


# --- numbers ------------------------------------------------------------------------------------


def every_function(hidden, weight, bias, data, options):
    """A sum that sends different gradients through each of the four, and what they return."""
    logits = hidden @ weight.T if bias is None else torch.addmm(bias, hidden, weight.T)
    without_inplace = {name: value for name, value in options.items() if name != "inplace"}
    linear = linear_grpo_loss(hidden, weight, bias=bias, **data | without_inplace)
    linear_logp, linear_entropy = linear_token_logprobs(hidden, weight, data["targets"], bias=bias)
    logp, entropy = token_logprobs(logits, data["targets"])
    weighted, _ = token_logprobs(logits, data["targets"], token_weights=data["token_weights"])
    plain = grpo_loss(logits * 1, **data | options)
    total = (
        2 * linear.loss
        + 3 * plain.loss
        + (linear_logp * linear_entropy).sum()
        + (logp * entropy).mean()
        + weighted.square().sum()
    )
    return total, linear, plain, linear_logp, entropy, weighted


def assert_compiles(leaves, data, options=COMMON):
    compiled = torch.compile(every_function, fullgraph=True, backend="aot_eager")
    expected = run(every_function, leaves, data, options)
    torch.testing.assert_close(run(compiled, leaves, data, options), expected, **TOLERANCE)


@pytest.mark.parametrize("name", OPTIONS)
def test_every_option(name):
    assert_compiles(*inputs(), COMMON | OPTIONS[name])


def test_no_bias_and_a_frozen_weight():
    leaves, data = inputs()
    assert_compiles([leaves[0], leaves[1].detach(), None], data)


def test_under_autocast():
    with torch.autocast("cpu", torch.bfloat16):
        assert_compiles(*inputs())


def test_the_weights_gradient_in_a_given_tensor():
    def step(hidden, weight, bias, data, total):
        options = COMMON | {"weight_grad": total}
        return linear_grpo_loss(hidden, weight, bias=bias, **data, **options).loss, total

    results = []
    for each in (step, torch.compile(step, fullgraph=True, backend="aot_eager")):
        leaves, data = inputs()
        loss, total = each(*leaves, data, torch.ones(V, D))
        loss.backward()
        results.append([loss.detach(), total, leaves[0].grad, leaves[2].grad])
        assert leaves[1].grad is None
    torch.testing.assert_close(*results, **TOLERANCE)


def test_every_operator_is_checked():
    """By torch.library.opcheck, in test_operators.py or where the operator is used."""
    registered = {
        name for name in torch._C._dispatch_get_all_op_names() if name.startswith("mr1_fast::")
    }
    elsewhere = LAYERS | {"mr1_fast::token_logprobs_backward_"}  # in test_liger_logits.py
    assert registered - elsewhere == {f"mr1_fast::{name.split()[0].rstrip(',')}" for name in CALLS}


# --- how often it compiles ----------------------------------------------------------------------


def linear_step(hidden, weight, bias, data, options, mask, num_tokens):
    """Weights and loss, as a training loop would compile them."""
    weights = token_weights(options["cu_seqlens"], "dapo", num_tokens=num_tokens, mask=mask)
    result = linear_grpo_loss(
        hidden, weight, bias=bias, **data | options | {"token_weights": weights}
    )
    return result.loss, result.kl


def logits_step(hidden, weight, bias, data, options, mask, num_tokens):
    """The same with a ratio per sequence, on logits, with weights of its own length."""
    weights = token_weights(options["cu_seqlens"], "grpo", num_sequences=num_tokens)
    logits, options = torch.addmm(bias, hidden, weight.T), options | {"ratio_level": "sequence"}
    result = grpo_loss(logits, **data | options | {"token_weights": weights})
    return result.loss, result.kl


SCHEDULE = [  # β, temperature, tokens N, sequences S, tokens of the whole step
    (0.07, 1.0, 12, 4, 30),
    (0.04, 0.9, 13, 5, 31),
    (0.0, 0.8, 17, 9, 40),
    (1.0, 1.2, 15, 3, 7),
    (0.1, 1.0, 12, 4, 30),
]


def compilations(step, schedule, **settings) -> list[int]:
    """Count the graphs after each step of the schedule, whose numbers must equal eager's."""
    compiled, counts = torch.compile(step, fullgraph=True, **settings), []
    for beta, temperature, n, s, num_tokens in schedule:
        leaves, data = inputs(n)
        options = dict(
            beta=beta, temperature=temperature, cu_seqlens=torch.tensor([0, *range(2, s + 1), n])
        )
        arguments = data, options, torch.arange(n) % 3 > 0, num_tokens
        torch.testing.assert_close(
            run(compiled, leaves, *arguments), run(step, leaves, *arguments), **TOLERANCE
        )
        counts.append(counters["stats"]["unique_graphs"])
    return counts


@pytest.mark.parametrize("step", [linear_step, logits_step])
@pytest.mark.parametrize("dynamic, expected", [(None, [1, 2, 2, 2, 2]), (True, [1] * 5)])
def test_a_schedule_and_new_lengths(step, dynamic, expected):
    assert compilations(step, SCHEDULE, dynamic=dynamic, backend="aot_eager") == expected


def test_a_schedule_of_floats_and_one_of_tensors():
    floats = [(beta, 1.0, N, 4, 30) for beta in (0.07, 0.06, 0.05, 0.0, 0.1)]
    tensors = [(torch.tensor(beta), torch.tensor(1.0), *rest) for beta, _, *rest in floats]
    assert compilations(linear_step, floats, backend="aot_eager") == [1, 2, 2, 2, 2]
    counters.clear()
    assert compilations(linear_step, tensors, backend="aot_eager") == [1] * 5


@pytest.mark.slow  # until its C++ is in torch's cache
def test_inductor():
    assert compilations(linear_step, SCHEDULE, dynamic=True) == [1] * 5


@pytest.fixture
def lengths_known_at_run_time():
    with torch._dynamo.config.patch(capture_dynamic_output_shape_ops=True):
        yield


def test_rows_picked_by_a_mask_inside(lengths_known_at_run_time):
    def step(hidden, weight, bias, data, mask):
        rows = {name: value[mask] for name, value in data.items()}
        return linear_grpo_loss(hidden[mask], weight, bias=bias, **rows, **COMMON)

    leaves, data = inputs()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for count in (0, 5, 9):
        mask = torch.arange(N) < count
        expected = run(step, leaves, data, mask)
        torch.testing.assert_close(run(compiled, leaves, data, mask), expected, **TOLERANCE)
    assert counters["stats"]["unique_graphs"] == 1


def test_a_model_and_the_loss_in_its_head(lengths_known_at_run_time):
    model, data, counts = text_model(), batch(), []
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for step in range(3):  # each has a function of its own
        data, gradients = data | {"advantages": data["advantages"] + step}, []
        for each in (compiled, model):
            loss = each(input_ids=data["ids"], head=loss_of("one pass", data, 20)).loss
            gradients.append(torch.autograd.grad(loss, list(model.parameters())))
        torch.testing.assert_close(*gradients, **TOLERANCE)
        counts.append(counters["stats"]["unique_graphs"])
    assert counts == [1] * 3
