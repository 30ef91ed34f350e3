"""Weights in 4 bits, quantised by bitsandbytes."""

import pytest
import torch
from torch import Tensor, nn

from mr1_fast.kernels.four_bit.weight import FourBitWeight


def four_bit_layer(
    weight: Tensor, kind: str = "nf4", nested: bool = True, block: int = 64, **settings
) -> nn.Module:
    """The layer of a weight (N, D) by bitsandbytes, in the order in which GPUs have it."""
    nn4 = pytest.importorskip("bitsandbytes").nn
    n, d = weight.shape
    layer = nn4.Linear4bit(d, n, bias=False, quant_type=kind, **settings)
    layer.weight = nn4.Params4bit(
        weight, requires_grad=False, quant_type=kind, compress_statistics=nested, blocksize=block,
        quant_storage=settings.get("quant_storage", torch.uint8), module=layer,
    )  # fmt: skip
    layer.support_avx512bf16_for_cpu = False
    return layer.to("cpu")


def four_bit_weight(n: int, d: int, device: str = "cpu", **settings) -> FourBitWeight:
    """Draw a weight (N, D) whose blocks have very different sizes."""
    generator = torch.Generator().manual_seed(n)
    size = 10 ** torch.linspace(-3, 1, n * d).view(n, d)
    layer = four_bit_layer(size * torch.randn(n, d, generator=generator), **settings)
    return FourBitWeight.of(layer.to(device))
