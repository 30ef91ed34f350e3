"""Several linear layers in one kernel: the error is at most twice PyTorch's in the same dtype."""

import pytest
import torch
from torch.nn.functional import linear, silu

from mr1_fast.kernels.decode import linear as decode_linear
from mr1_fast.kernels.decode.linear_triton import Tile, linears, swiglu

TINY = Tile(columns=16, rows=16, depth=32, warps=4, stages=2)
DTYPES = pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)


def tensors(rows: int, d: int, widths: tuple[int, ...], dtype: torch.dtype, device: str):
    """Draw x, weights and biases; the rows of x have very different sizes and lie apart."""
    generator = torch.Generator().manual_seed(rows)
    x = 10 ** torch.linspace(-2, 2, rows)[:, None] * torch.randn(rows, 2 * d, generator=generator)
    weights = [torch.randn(n, d, generator=generator) / d**0.5 for n in widths]
    biases = [torch.randn(n, generator=generator) for n in widths]
    return x.to(device, dtype)[:, :d], *(
        [t.to(device, dtype) for t in each] for each in (weights, biases)
    )


def assert_within_bound(ours, eager, exact):
    """Assert |ours − fp64| ≤ 2·|eager − fp64| + tiny, at the largest and on average."""
    mistakes, allowed = ((each.double() - exact).abs() for each in (ours, eager))
    tiny = 1e-6 * exact.abs().amax()
    assert mistakes.amax() <= 2 * allowed.amax() + tiny
    assert mistakes.mean() <= 2 * allowed.mean() + tiny


@DTYPES
@pytest.mark.parametrize(
    ("rows", "d", "widths", "with_bias"),
    [
        (1, 64, (32,), True),
        (3, 96, (33, 7, 16), True),
        (17, 72, (32, 16), True),
        (64, 96, (32, 16, 16), False),
        (65, 32, (20,), False),
    ],
)
def test_linears(device, rows, d, widths, with_bias, dtype):
    x, weights, biases = tensors(rows, d, widths, dtype, device)
    biases = biases if with_bias else [None] * len(widths)
    outputs = linears(x, weights, biases, tile=TINY)
    assert [out.shape for out in outputs] == [(rows, n) for n in widths]
    for out, weight, bias in zip(outputs, weights, biases, strict=True):
        assert out.dtype == dtype
        exact = linear(x.double(), weight.double(), None if bias is None else bias.double())
        assert_within_bound(out, linear(x, weight, bias), exact)


@DTYPES
@pytest.mark.parametrize(("rows", "d", "f"), [(1, 64, 16), (17, 72, 11), (65, 64, 24)])
def test_swiglu(device, rows, d, f, dtype):
    x, (gate, up), _ = tensors(rows, d, (f, f), dtype, device)
    exact = silu(linear(x.double(), gate.double())) * linear(x.double(), up.double())
    assert_within_bound(
        swiglu(x, gate, up, tile=TINY), silu(linear(x, gate)) * linear(x, up), exact
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=str)
def test_public_functions_choose_by_dtype(device, dtype):
    x, (gate, up), (bias, _) = tensors(3, 128, (16, 16), dtype, device)
    (out,) = decode_linear.linears(x, (gate,), (bias,))
    assert_within_bound(
        out, linear(x, gate, bias), linear(x.double(), gate.double(), bias.double())
    )
    gated = decode_linear.swiglu(x, gate, up)
    exact = silu(linear(x.double(), gate.double())) * linear(x.double(), up.double())
    assert_within_bound(gated, silu(linear(x, gate)) * linear(x, up), exact)
