"""A weight in 4 bits is read where bitsandbytes' layer holds it."""

import pytest
import torch
from torch import nn

from mr1_fast.kernels.four_bit.reference import dequantise_ref
from mr1_fast.kernels.four_bit.weight import FourBitWeight

from ...data.four_bits import four_bit_layer

bitsandbytes = pytest.importorskip("bitsandbytes")


@pytest.mark.parametrize("storage", [torch.bfloat16, torch.float32, torch.uint8], ids=str)
def test_numbers_may_be_stored_as_another_dtype(storage):
    x = torch.randn(6, 128)
    layer = four_bit_layer(x, quant_storage=storage)
    assert layer.weight.dtype == storage
    weight = FourBitWeight.of(layer)
    assert weight.shape == (6, 128) and weight.packed.shape == (6 * 64,)
    assert weight.packed.data_ptr() == layer.weight.data_ptr()
    expected = dequantise_ref(FourBitWeight.of(four_bit_layer(x)), torch.float32)
    assert torch.equal(dequantise_ref(weight, torch.float32), expected)


@pytest.mark.parametrize("nested", [False, True])
def test_bytes_are_those_that_a_product_reads(nested):
    weight = FourBitWeight.of(four_bit_layer(torch.randn(512, 64), nested=nested))
    assert weight.nbytes == 512 * 32 + (512 + 2 * 4 if nested else 512 * 4)


def test_other_modules_have_no_such_weight():
    assert FourBitWeight.of(nn.Linear(64, 64)) is None
    assert FourBitWeight.of(nn.LayerNorm(64)) is None
    assert FourBitWeight.of(nn.GELU()) is None
    assert FourBitWeight.of(bitsandbytes.nn.Linear4bit(64, 64)) is None, "not quantised yet"
    layer = four_bit_layer(torch.randn(64, 64))
    layer.weight.quant_state.packing_format_for_cpu = True
    assert FourBitWeight.of(layer) is None, "packed in another order"
    layer = four_bit_layer(torch.randn(64, 64))
    layer.out_features = 32
    assert FourBitWeight.of(layer) is None, "of another shape"


def test_levels_are_exact_whatever_dtype_was_the_default():
    x = torch.randn(64, 64)
    exact = FourBitWeight.of(four_bit_layer(x))
    torch.set_default_dtype(torch.bfloat16)
    try:
        rounded = four_bit_layer(x)
        assert rounded.weight.quant_state.code.dtype == torch.bfloat16
        weight, again = FourBitWeight.of(rounded), FourBitWeight.of(rounded)
    finally:
        torch.set_default_dtype(torch.float32)
    assert torch.equal(weight.code, exact.code)
    assert weight.code.data_ptr() == again.code.data_ptr(), "a CUDA graph keeps the address"
