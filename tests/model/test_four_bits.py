"""Weights in 4 bits: bitsandbytes' own numbers, dequantised once in each pass over a layer."""

import weakref

import pytest
import torch
from torch import nn

from mr1_fast.model import block_parts, four_bits
from mr1_fast.model.families import FAMILIES, text_model
from mr1_fast.model.four_bits import FourBits
from mr1_fast.model.linears import Linears
from mr1_fast.model.policy import Policy
from mr1_fast.model.reference import Reference

from ..data.models import assert_same_gradients, gradients
from .test_blocks import adapted_policy, batch_of
from .test_forward import packed_logprobs, weighted

bitsandbytes = pytest.importorskip("bitsandbytes")
functional = bitsandbytes.functional

LAYERS, ROLES = 3, 7


def in_four_bits(linear: nn.Linear, nested: bool = True, **settings) -> nn.Module:
    """The same layer by bitsandbytes, as this package loads it."""
    settings = {"quant_type": "nf4", "compute_dtype": linear.weight.dtype, **settings}
    sizes = linear.in_features, linear.out_features, linear.bias is not None
    small = bitsandbytes.nn.Linear4bit(*sizes, compress_statistics=nested, **settings)
    small.weight.data = linear.weight.data
    small.bias = linear.bias
    small.support_avx512bf16_for_cpu = False
    return small.to("cpu")


def four_bit_policy(dtype: torch.dtype = torch.float32, **settings) -> Policy:
    """An `adapted_policy` whose language model is in 4 bits under its adapters."""
    policy = adapted_policy(dtype, **settings)
    for layer in text_model(policy.model).layers:
        for adapted in (*layer.self_attn.children(), *layer.mlp.children()):
            if hasattr(adapted, "base_layer"):
                adapted.base_layer = in_four_bits(adapted.base_layer)
    return policy


@pytest.mark.parametrize(
    "dtype, settings",
    [
        (torch.float32, {"recompute": "none"}),
        (torch.bfloat16, {"recompute": "none"}),
        (torch.bfloat16, {"recompute": "all"}),
        *((torch.float32, {"recompute": "all", "family": family}) for family in FAMILIES),
    ],
    ids=str,
)
def test_loss_and_gradients_are_those_of_bitsandbytes(dtype, settings, no_module_runs):
    policy = four_bit_policy(dtype, **settings)
    logp = packed_logprobs(policy)
    ours = gradients(policy, weighted(logp))
    policy.layers.fused = False
    expected = packed_logprobs(policy)
    near = {torch.float32: 2e-5, torch.bfloat16: 0.05}[dtype]
    torch.testing.assert_close(logp, expected, rtol=near, atol=near)
    assert_same_gradients(ours, gradients(policy, weighted(expected)), near)


@pytest.mark.parametrize("recompute", ["none", "all"])
def test_a_weight_is_dequantised_once_in_each_pass(recompute, monkeypatch, no_module_runs):
    policy, calls = four_bit_policy(recompute=recompute), []
    dequantise = four_bits.dequantise

    def counted(weights, dtype):
        calls.extend(weight.packed.data_ptr() for weight in weights)
        return dequantise(weights, dtype)

    monkeypatch.setattr(four_bits, "dequantise", counted)
    logp = policy.logprobs(batch_of(policy), 0.7)[0]
    assert len(calls) == len(set(calls)) == LAYERS * ROLES, "the forward pass"
    calls.clear()
    logp.sum().backward()
    assert len(calls) == len(set(calls)) == LAYERS * ROLES, "recomputation and gradients"


@pytest.mark.parametrize("recompute", ["none", "all"])
def test_dequantised_weights_live_for_one_layer(recompute, monkeypatch, no_module_runs):
    policy = four_bit_policy(recompute=recompute)
    layer, made = text_model(policy.model).layers[0], weakref.WeakSet()
    dequantise, most = FourBits.dequantise, [0]
    of_a_layer = sum(
        each.four_bits.dequantise().nbytes for each in block_parts.text_block(layer).linears
    )

    def counted(weights):
        weight = dequantise(weights)
        made.add(weight.untyped_storage())
        most[0] = max(most[0], sum(storage.nbytes() for storage in made))
        return weight

    monkeypatch.setattr(FourBits, "dequantise", counted)
    logp = policy.logprobs(batch_of(policy), 0.7)[0]
    assert 0 < most[0] <= of_a_layer and not made, "none is kept for the backward pass"
    most[0] = 0
    logp.sum().backward()
    assert 0 < most[0] <= of_a_layer and not made


def test_the_reference_is_the_model_without_adapters(no_module_runs):
    policy = four_bit_policy()
    batch = batch_of(policy)
    ours = Reference(policy).logprobs([batch], 0.7)[0]
    policy.layers.fused = False
    torch.testing.assert_close(
        ours, Reference(policy).logprobs([batch], 0.7)[0], rtol=1e-5, atol=1e-5
    )
    assert (policy.logprobs(batch, 0.7)[0] - ours).abs().max() > 1e-2


# --- layers by themselves -------------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("quant_type", ["nf4", "fp4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_weights_are_bitsandbytes_own(dtype, quant_type, nested):
    torch.manual_seed(0)
    layers = [
        in_four_bits(nn.Linear(128, n, dtype=dtype), nested, quant_type=quant_type)
        for n in (64, 32)
    ]
    expected = torch.cat(
        [functional.dequantize_4bit(each.weight, each.weight.quant_state) for each in layers]
    )
    ours = FourBits.of(layers).dequantise()
    assert ours.dtype == dtype and torch.equal(ours, expected)


def test_a_layer_quantised_from_another_dtype():
    """As in a checkpoint made in fp16, trained in bf16."""
    torch.manual_seed(0)
    layer = in_four_bits(nn.Linear(128, 64, dtype=torch.float16), compute_dtype=torch.bfloat16)
    assert Linears.of(layer) is None, "its bias has another dtype than its product"
    layer.bias.data = layer.bias.data.bfloat16()
    x = torch.randn(5, 128, dtype=torch.bfloat16)
    y, _ = Linears.of(layer).product(x)
    torch.testing.assert_close(y, layer(x), rtol=2e-2, atol=2e-2)
    assert y.dtype == torch.bfloat16


def test_other_layers_are_left_to_themselves():
    half = in_four_bits(nn.Linear(64, 64))
    other = in_four_bits(nn.Linear(64, 64), compute_dtype=torch.bfloat16)
    assert FourBits.of([half, half]) is not None
    assert FourBits.of([half, other]) is None, "they compute in different dtypes"
    assert Linears.of(half, nn.Linear(64, 64)) is None
    empty = bitsandbytes.nn.Linear4bit(64, 64)
    assert empty.weight.quant_state is None and Linears.of(empty) is None
    half.weight.quant_state.packing_format_for_cpu = True
    assert Linears.of(half) is None


def test_a_layer_that_computes_in_another_dtype_than_its_norms_is_left_to_itself():
    policy = four_bit_policy()
    layer = text_model(policy.model).layers[0]
    assert block_parts.text_block(layer) is not None
    layer.mlp.down_proj.base_layer.compute_dtype = torch.bfloat16
    assert block_parts.text_block(layer) is None
