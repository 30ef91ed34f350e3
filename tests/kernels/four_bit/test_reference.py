"""Dequantisation as specified gives the bits that bitsandbytes gives."""

import pytest
import torch

from mr1_fast.kernels.four_bit.reference import dequantise_ref, scales_ref
from mr1_fast.kernels.four_bit.weight import FourBitWeight

from ...data.four_bits import four_bit_layer

functional = pytest.importorskip("bitsandbytes").functional


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("block", [64, 128])
@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_weights_are_bitsandbytes_own(kind, nested, block, dtype):
    # More than 256 blocks, so that scales have two scales of their own
    layer = four_bit_layer(torch.randn(130, 384).to(dtype), kind, nested, block)
    expected = functional.dequantize_4bit(layer.weight, layer.weight.quant_state)
    weight = FourBitWeight.of(layer)
    ours = dequantise_ref(weight, dtype)
    assert ours.dtype == expected.dtype == dtype and torch.equal(ours, expected)
    assert len(scales_ref(weight)) == 130 * 384 // block
    assert (weight.absmax.dtype == torch.uint8) is nested


@pytest.mark.parametrize(("n", "d"), [(40, 96), (3, 70), (5, 33)])
def test_blocks_go_on_in_the_next_row(n, d):
    """bitsandbytes' own operator has them end with a row, on a CPU; it quantises as specified."""
    x = torch.randn(n, d) * 10 ** torch.linspace(-3, 1, n * d).view(n, d)
    weight = FourBitWeight.of(four_bit_layer(x, nested=False))
    flat = torch.nn.functional.pad(x.flatten(), (0, -x.numel() % 64)).view(-1, 64)
    assert torch.equal(scales_ref(weight), flat.abs().amax(dim=1))
    nearest = 0.16 * flat.abs().amax(dim=1, keepdim=True).expand_as(flat)  # half the widest gap
    mistake = (dequantise_ref(weight, torch.float32) - x).abs().flatten()
    assert (mistake <= nearest.flatten()[: x.numel()]).all()
