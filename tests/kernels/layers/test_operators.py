"""The operators of layers: by the rules of torch.library, one dispatched operation each."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from mr1_fast.kernels.layers import operators

from ...data.layers import (
    draw,
    gate_case,
    gelu_case,
    norm_case,
    norm_rotary_case,
    rotary_case,
    run,
)

T, D, F, HEADS, KV_HEADS, WIDTH = 5, 24, 20, 3, 1, 8


def calls(tokens: int = T) -> dict[str, tuple]:
    """Return every operator with arguments, by its name and what is special about the call."""

    def rows(*shape: int):
        return draw(tokens, *shape)

    x, weight, bias, eps = rows(D), draw(D), draw(D, seed=1), 1e-6
    qkv, cos, sin = rows((HEADS + 2 * KV_HEADS) * WIDTH), rows(WIDTH), rows(WIDTH)
    qkv_bias, gate_bias = draw((HEADS + 2 * KV_HEADS) * WIDTH), draw(2 * F)
    heads = rows(HEADS, WIDTH), rows(KV_HEADS, WIDTH), 2 * rows(KV_HEADS, WIDTH)
    normed = draw(WIDTH), draw(WIDTH, seed=1), eps, cos, sin
    backward = operators.norm_backward
    return {
        "norm": (operators._norm, (x, weight, None, eps)),
        "norm, LayerNorm": (operators._norm, (x, weight, bias, eps)),
        "add_norm": (operators._add_norm, (x, 2 * x, weight, None, eps)),
        "add_norm, LayerNorm": (operators._add_norm, (x, 2 * x, weight, bias, eps)),
        "norm_backward": (backward, (x, x, x, weight, None, eps, True, True)),
        "norm_backward, LayerNorm": (backward, (x, x, x, weight, bias, eps, True, True)),
        "norm_backward, dx alone": (backward, (x, None, x, weight, None, eps, False, False)),
        "norm_gradients": (operators.norm_gradients, (draw(3, 2, D), weight)),
        "rotary": (operators._rotary, (qkv, qkv_bias, cos, sin, HEADS, KV_HEADS)),
        "rotary, no bias": (operators._rotary, (qkv, None, cos, sin, HEADS, KV_HEADS)),
        "rotary_backward": (operators.rotary_backward, (*heads, cos, sin)),
        "norm_rotary": (operators._norm_rotary, (qkv, *normed, HEADS, KV_HEADS)),
        "norm_rotary_backward": (operators.norm_rotary_backward, (*heads, qkv, *normed, True)),
        "norm_rotary_backward, no sums": (
            operators.norm_rotary_backward,
            (*heads, qkv, *normed, False),
        ),
        "silu_mul": (operators._silu_mul, (rows(2 * F), gate_bias)),
        "silu_mul, no bias": (operators._silu_mul, (rows(2 * F), None)),
        "silu_mul_backward": (operators.silu_mul_backward, (rows(F), rows(2 * F), gate_bias)),
        "gelu": (operators._gelu, (rows(F), "quick")),
        "gelu, tanh": (operators._gelu, (rows(F), "tanh")),
        "gelu_backward": (operators.gelu_backward, (rows(F), rows(F), "quick")),
        "gelu_backward, tanh": (operators.gelu_backward, (rows(F), rows(F), "tanh")),
    }


CALLS = list(calls())
NAMES = {f"mr1_fast::{name.split(',')[0]}" for name in CALLS}
"""The operators that are checked here."""

CASES = {
    "norm": norm_case(T, D, torch.float32, layer=False, added=False),
    "add_norm": norm_case(T, D, torch.float32, layer=True, added=True),
    "rotary": rotary_case(T, HEADS, KV_HEADS, WIDTH, False, torch.float32, biased=True),
    "norm_rotary": norm_rotary_case(T, HEADS, KV_HEADS, WIDTH, torch.float32),
    "silu_mul": gate_case(T, F, torch.float32, biased=True),
    "gelu": gelu_case(T, F, torch.float32, "tanh"),
}


class Dispatched(TorchDispatchMode):
    """Records which operations are dispatched."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.names.append(str(function))
        return function(*args, **kwargs or {})


def on_meta(arguments: tuple) -> list:
    """Return the arguments with tensors moved to the meta device."""
    return [each.to("meta") if isinstance(each, torch.Tensor) else each for each in arguments]


def shapes(results) -> list[tuple]:
    """Return what a caller sees of results but for their values."""
    results = results if isinstance(results, tuple) else (results,)
    return [(each.shape, each.stride(), each.dtype) for each in results]


@pytest.mark.parametrize("tokens", [T, 0])
@pytest.mark.parametrize("name", CALLS)
def test_operators_keep_the_rules_of_torch_library(name, tokens):
    operator, arguments = calls(tokens)[name]
    torch.library.opcheck(operator, arguments)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("name", CALLS)
def test_on_the_meta_device_each_is_one_operation(name, dtype):
    operator, arguments = calls()[name]
    arguments = [x.to(dtype) if isinstance(x, torch.Tensor) else x for x in arguments]
    meta = on_meta(arguments)
    with Dispatched() as dispatched:
        planned = operator(*meta)
    assert dispatched.names == [str(operator)]
    assert shapes(planned) == shapes(operator(*arguments))


@pytest.mark.parametrize("name", CASES)
def test_gradients_on_the_meta_device_are_few_operations(name):
    case = CASES[name]
    leaves = [x.to("meta").requires_grad_() for x in case.inputs]
    with Dispatched() as dispatched:
        outputs = case.ours(*leaves)
        torch.autograd.grad(outputs, leaves, [torch.empty_like(each) for each in outputs])
    own = [each for each in dispatched.names if each.startswith("mr1_fast")]
    expected = [name, f"{name}_backward"]
    if name == "norm_rotary":
        expected.append("norm_gradients")
    elif "norm" in name:
        expected = [name, "norm_backward", "norm_gradients"]
    assert own == [f"mr1_fast.{each}.default" for each in expected]


@pytest.mark.parametrize("name", CASES)
def test_compiled_without_a_break(name):
    case = CASES[name]
    compiled = torch.compile(case.ours, fullgraph=True, backend="aot_eager")
    for ours, expected in zip(run(compiled, case.inputs), run(case.ours, case.inputs), strict=True):
        assert torch.equal(ours, expected)


@pytest.mark.parametrize("name", ["norm", "add_norm"])
def test_frozen_weights_have_no_sums(name, monkeypatch):
    *rows, weight, bias = norm_case(T, D, torch.float32, True, name == "add_norm").inputs
    rows = [x.requires_grad_() for x in rows]
    asked = []
    backward = operators.norm_backward
    monkeypatch.setattr(
        operators, "norm_backward", lambda *args: asked.append(args[-1]) or backward(*args)
    )
    for frozen in (True, False):
        outputs = getattr(operators, name)(*rows, weight.requires_grad_(not frozen), bias, 1e-6)
        last = outputs[-1] if isinstance(outputs, tuple) else outputs
        last.sum().backward()
        assert (weight.grad is None) == frozen and bias.grad is None
    assert asked == [False, True]


def test_gradients_expanded_from_one_number_are_taken():
    for name, case in CASES.items():
        leaves = [x.clone().requires_grad_() for x in case.inputs]
        sum(each.sum() for each in case.ours(*leaves)).backward()
        outputs = case.theirs(*(copies := [x.clone().requires_grad_() for x in case.inputs]))
        sum(each.sum() for each in outputs).backward()
        for ours, theirs in zip(leaves, copies, strict=True):
            torch.testing.assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-5, msg=name)


def test_a_gradient_of_a_gradient_is_refused():
    x = CASES["norm"].inputs[0].requires_grad_()
    weight = torch.ones(D)
    (gradient,) = torch.autograd.grad(
        operators.norm(x, weight, None, 1e-6).square().sum(), x, create_graph=True
    )
    with pytest.raises(RuntimeError, match="once_differentiable"):
        gradient.sum().backward()
