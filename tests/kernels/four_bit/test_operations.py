"""Weights come out one below the other, by each way with the reference's bits."""

import pytest
import torch

from mr1_fast.kernels.four_bit import operations
from mr1_fast.kernels.four_bit.reference import dequantise_ref

from ...data.four_bits import four_bit_weight

DTYPES = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)


def reference(weights, dtype):
    return torch.cat([dequantise_ref(weight, dtype) for weight in weights])


@DTYPES
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("d", [96, 128])  # in 96, blocks go on in the next row
@pytest.mark.parametrize("with_bitsandbytes", [True, False])
def test_weights_are_one_below_the_other(with_bitsandbytes, d, kind, dtype, monkeypatch):
    weights = [four_bit_weight(n, d, kind=kind) for n in (8, 300, 2)]
    if not with_bitsandbytes:
        monkeypatch.setattr(operations, "find_spec", lambda name: None)
    out = operations.dequantise(weights, dtype)
    assert out.dtype == dtype and torch.equal(out, reference(weights, dtype))


def test_weights_of_several_kinds():
    weights = [
        four_bit_weight(3, 128),
        four_bit_weight(5, 128, nested=False),
        four_bit_weight(2, 128, block=128),
    ]
    expected = reference(weights, torch.bfloat16)
    assert torch.equal(operations.dequantise(weights, torch.bfloat16), expected)


def test_the_last_block_may_be_a_part():
    weight = four_bit_weight(3, 70)
    out = operations.dequantise([weight], torch.float32)
    assert weight.absmax.numel() == 4 and torch.equal(out, dequantise_ref(weight, torch.float32))


def test_a_dtype_other_than_the_quantised_one_is_rounded_once():
    weight = four_bit_weight(64, 64)
    exact = dequantise_ref(weight, torch.float32)
    assert torch.equal(operations.dequantise([weight], torch.bfloat16), exact.bfloat16())
