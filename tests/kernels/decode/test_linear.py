"""Linear layers of a decode step in PyTorch, against peft, bitsandbytes and plain modules."""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.nn.functional import linear, silu

from mr1_fast.kernels.decode.layer import Adapter, Layer
from mr1_fast.kernels.decode.linear import linear_parts, linears, swiglu, takes
from mr1_fast.kernels.decode.reference import linear_ref
from mr1_fast.kernels.four_bit.weight import FourBitWeight
from mr1_fast.model.adapters import base_and_adapter

ROUNDING = dict(rtol=1e-6, atol=1e-6)


def lora_layer(rank: int, alpha: int) -> nn.Module:
    """Make a linear layer with an adapter of peft's, whose B is not zero."""
    torch.manual_seed(rank)
    model = nn.ModuleDict({"proj": nn.Linear(48, 20)})
    config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=["proj"])
    module = get_peft_model(model, config).base_model.model["proj"]
    nn.init.normal_(module.lora_B["default"].weight)
    return module


@pytest.mark.parametrize(("rank", "alpha"), [(1, 1), (8, 5), (20, 32)])
def test_an_adapter_adds_what_peft_adds(rank, alpha):
    module, x = lora_layer(rank, alpha), torch.randn(3, 48)
    base, adapter = base_and_adapter(module)
    layer = Layer(base.weight, base.bias, adapter)
    torch.testing.assert_close(linear_ref(x, layer), module(x), **ROUNDING)


def test_an_adapter_in_fp32_is_rounded_to_the_dtype_of_x():
    base, adapter = base_and_adapter(lora_layer(8, 5))
    x = torch.randn(3, 48).bfloat16()
    rounded = Adapter(adapter.a.bfloat16(), adapter.b.bfloat16(), adapter.scale)
    weight, bias = base.weight.bfloat16(), base.bias.bfloat16()
    ours = linear_ref(x, Layer(weight, bias, adapter))
    assert ours.dtype == torch.bfloat16
    assert torch.equal(ours, linear_ref(x, Layer(weight, bias, rounded)))


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
def test_a_weight_in_four_bits_is_what_bitsandbytes_dequantises(quant_type, nested):
    bnb = pytest.importorskip("bitsandbytes")
    torch.manual_seed(0)
    module = bnb.nn.Linear4bit(
        128, 40, compute_dtype=torch.float32, compress_statistics=nested, quant_type=quant_type
    )
    module.to("cpu")
    weight = FourBitWeight.of(module)
    assert weight is not None and (weight.absmax_code is not None) == nested
    dense = bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    x = torch.randn(3, 128)
    expected = linear(x, dense.float(), module.bias)
    torch.testing.assert_close(linear_ref(x, Layer(weight, module.bias)), expected, **ROUNDING)


def test_the_public_functions_apply_plain_modules():
    torch.manual_seed(0)
    x, modules = torch.randn(3, 48), [nn.Linear(48, n) for n in (20, 20, 7)]
    layers = [Layer(module.weight, module.bias) for module in modules]
    assert not takes(layers, x)
    for ours, module in zip(linears(x, layers), modules, strict=True):
        torch.testing.assert_close(ours, module(x), **ROUNDING)
    gate, up, _ = modules
    torch.testing.assert_close(swiglu(x, *layers[:2]), silu(gate(x)) * up(x), **ROUNDING)
    torch.testing.assert_close(linear_parts(x, layers[0]), gate(x), **ROUNDING)
