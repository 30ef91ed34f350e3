"""Linear layers on the same input, computed together, give what each gives alone, with peft's own
layers and autograd as the reference."""

import pytest
import torch
from torch import Tensor, nn

from mr1_fast.model.linears import Linears

TOKENS, WIDTH = 37, 24
GROUPS = {
    "q k v": ((40, 16, 16), True),
    "gate up": ((48, 48), False),
    "three alike": ((16, 16, 16), True),
    "all different": ((8, 16, 24), False),
    "alone": ((32,), False),
    "alone with bias": ((32,), True),
}
"""Numbers of outputs of each layer, and whether it has a bias."""


def plain_layers(group: str, dtype: torch.dtype) -> list[nn.Module]:
    lengths, bias = GROUPS[group]
    torch.manual_seed(1)
    return [nn.Linear(WIDTH, length, bias=bias, dtype=dtype) for length in lengths]


def lora_layers(group: str, dtype: torch.dtype, rank: int = 6, **settings) -> list[nn.Module]:
    """peft's layers over frozen ones, with adapters as large as the weights."""
    peft = pytest.importorskip("peft")
    model = nn.Module()
    model.layers = nn.ModuleList(plain_layers(group, dtype))
    settings = {"target_modules": r"layers\.\d+", "lora_alpha": 3 * rank, **settings}
    model = peft.get_peft_model(model, peft.LoraConfig(r=rank, **settings))
    for name, parameter in model.named_parameters():
        if dtype == torch.float64:
            parameter.data = parameter.data.to(dtype)
        if "lora_B" in name:
            nn.init.normal_(parameter, std=0.1)
    return list(model.base_model.model.layers)


def alone(layers: list[nn.Module], x: Tensor, dy: Tensor) -> tuple[Tensor, list[Tensor | None]]:
    """Outputs side by side, and the gradients of x and of all parameters, by autograd."""
    x = x.detach().requires_grad_()
    y = torch.cat([layer(x) for layer in layers], dim=1)
    parameters = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    return y, torch.autograd.grad(y, [x, *parameters], dy)


def together(layers: list[nn.Module], x: Tensor, dy: Tensor, keeps: bool = True):
    """The same as `alone` by `Linears`."""
    linears = Linears.of(*layers)
    with torch.no_grad():
        y, kept = linears.product(x)
        if linears.bias_to_add is not None:
            y = y + linears.bias_to_add
        dx, dt = linears.input_gradient(dy, kept)
        if not keeps:
            kept, dt = type(kept)(), None
        needed = [tensor.requires_grad for tensor in linears.tensors]
        gradients = linears.gradients(dy, x, needed, kept, dt)
    found = dict(zip(map(id, linears.tensors), gradients, strict=True))
    biases = dy.sum(0).split([layer.out_features for layer in layers])
    found |= {
        id(layer.bias): bias
        for layer, bias in zip(layers, biases, strict=True)
        if getattr(layer, "bias", None) is not None
    }
    parameters = [p for layer in layers for p in layer.parameters() if p.requires_grad]
    return y, [dx, *(found[id(parameter)] for parameter in parameters)]


def inputs(layers: list[nn.Module], dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    torch.manual_seed(2)
    outputs = sum(layer.out_features for layer in layers)
    return torch.randn(TOKENS, WIDTH).to(dtype), torch.randn(TOKENS, outputs).to(dtype)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("make", [plain_layers, lora_layers])
@pytest.mark.parametrize("keeps", [True, False], ids=["kept", "computed again"])
def test_a_group_equals_its_layers(make, group, keeps):
    layers = make(group, torch.float64)
    x, dy = inputs(layers, torch.float64)
    expected, expected_gradients = alone(layers, x, dy)
    y, gradients = together(layers, x, dy, keeps)
    torch.testing.assert_close(y, expected, rtol=1e-12, atol=1e-12)
    for ours, right in zip(gradients, expected_gradients, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("group", GROUPS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_adapters_are_no_less_exact_than_pefts(group, dtype):
    """Against the same numbers in fp64.

    peft computes in fp32 what is rounded here as the layers' own products are: on exact inputs, the
    gradients of adapters may be off by a rounding. Whole models are compared in test_blocks.py.
    """
    layers = lora_layers(group, dtype)
    x, dy = inputs(layers, dtype)
    y, gradients = together(layers, x, dy)
    eager, eager_gradients = alone(layers, x, dy)
    for layer in layers:
        layer.double()
    exact, exact_gradients = alone(layers, x.double(), dy.double())
    assert y.dtype == dtype
    pairs = [(y, eager, exact), *zip(gradients, eager_gradients, exact_gradients, strict=True)]
    for ours, theirs, right in pairs:
        assert ours.dtype == theirs.dtype, "the gradient of an adapter has its dtype"
        error, allowed = ((each.double() - right).norm() for each in (ours, theirs))
        assert error <= 2 * allowed + torch.finfo(dtype).eps / 2 * right.norm()


def test_only_what_needs_a_gradient_has_one():
    layers = lora_layers("q k v", torch.float64)
    linears = Linears.of(*layers)
    x, dy = inputs(layers, torch.float64)
    _, kept = linears.product(x)
    for wanted in range(len(linears.tensors)):
        needed = [index == wanted for index in range(len(linears.tensors))]
        found = linears.gradients(dy, x, needed, kept, None)
        assert [each is not None for each in found] == needed
        assert found[wanted].shape == linears.tensors[wanted].shape


# --- which layers are known -----------------------------------------------------------------------


def test_without_an_active_adapter_a_layer_is_its_base():
    layers = lora_layers("q k v", torch.float32)
    x, _ = inputs(layers, torch.float32)
    for switch in (
        lambda layer: layer.enable_adapters(False),
        lambda layer: (layer.enable_adapters(True), layer.merge()),
    ):
        for layer in layers:
            switch(layer)
        linears = Linears.of(*layers)
        assert linears.adapters is None
        y = linears.product(x)[0] + linears.bias_to_add
        torch.testing.assert_close(y, torch.cat([layer(x) for layer in layers], dim=1))


def test_adapters_that_are_to_be_taken_out_of_the_weights_are_pefts_to_take():
    layers = lora_layers("alone", torch.float32)
    layers[0].merge()
    layers[0].enable_adapters(False)
    assert Linears.of(*layers) is None


@pytest.mark.parametrize(
    "settings",
    [
        {"lora_dropout": 0.1},
        {"use_dora": True},
        {"lora_bias": True},
        {"target_modules": r"layers\.1"},
        {"rank_pattern": {r"layers\.0": 3}},
    ],
    ids=str,
)
def test_other_forms_are_left_to_the_layers_themselves(settings):
    assert Linears.of(*lora_layers("q k v", torch.float32, **settings)) is None


def test_dropout_counts_in_training_alone():
    layers = lora_layers("q k v", torch.float32, lora_dropout=0.1)
    assert Linears.of(*(layer.eval() for layer in layers)) is not None


def test_two_adapters_and_other_layers_are_left_to_themselves():
    layers = lora_layers("gate up", torch.float32)
    peft = pytest.importorskip("peft")
    for layer in layers:
        layer.update_layer("other", r=4, lora_alpha=4, config=peft.LoraConfig(r=4))
    assert Linears.of(*layers) is not None, "one of them is active"
    for layer in layers:
        layer.set_adapter(["default", "other"])
    assert Linears.of(*layers) is None
    assert Linears.of(nn.Linear(4, 4), nn.Linear(4, 4, bias=False)) is None
    assert Linears.of(nn.Bilinear(4, 4, 4)) is None


def test_adapters_of_different_ranks_and_one_scale_are_computed():
    layers = lora_layers(
        "q k v",
        torch.float64,
        rank_pattern={r"layers\.0": 3},
        alpha_pattern={r"layers\.0": 9},
    )
    x, dy = inputs(layers, torch.float64)
    for ours, right in zip(together(layers, x, dy)[1], alone(layers, x, dy)[1], strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-12, atol=1e-12)
