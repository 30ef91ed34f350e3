"""Rounding at random: means are right, random numbers uniform, codes neighbours of their values.

Statistical bounds are 6 standard deviations of the mean. Seeds are fixed.
"""

import math

import numpy as np
import pytest
import torch

from mr1_fast.kernels.adamw import rounding

SIX_SIGMA = 6.0


@pytest.mark.parametrize("value", [1.001, -1.001, 0.02, 1.9999, 3e-39, 0.0])
def test_rounding_to_bf16_is_unbiased_and_goes_to_a_neighbour(value):
    n = 2**18
    x = torch.full((n,), value)
    bits = rounding.more_bits(rounding.random_bits(0, n, (1, 2), x.device))
    rounded = rounding.round_stochastically(x, bits).double()
    low, high = rounded.min().item(), rounded.max().item()
    exact = x[0].double().item()
    assert low <= exact <= high and high - low <= max(abs(exact) * 2**-7, 1e-40)
    assert abs(rounded.mean().item() - exact) <= SIX_SIGMA * (high - low) / 2 / math.sqrt(n)


def test_infinity_and_nan_survive_rounding():
    x = torch.tensor([0x7FFFFFFF, -1, 0x7FC00000, 0x7F800000, -0x800000], dtype=torch.int32).view(
        torch.float32
    )
    rounded = rounding.round_stochastically(x, torch.full((5,), 0xFFFF, dtype=torch.int32))
    assert rounded[:3].isnan().all() and rounded[3:].tolist() == [math.inf, -math.inf]


def test_random_bits_are_uniform_and_differ_between_keys_and_elements():
    n = 2**16
    streams = [
        rounding.random_bits(0, n, rounding.random_keys(0, p, s), "cpu")
        for p in range(2)
        for s in range(2)
    ]
    bits = torch.stack(streams)[:, :, None] >> torch.arange(32) & 1
    sigma = 0.5 / math.sqrt(n)
    assert (bits.float().mean(1) - 0.5).abs().max() < SIX_SIGMA * sigma
    # Every bit of every stream is compared with every other
    signs = (bits * 2.0 - 1).transpose(1, 2).flatten(0, 1)
    correlation = signs @ signs.T / n - torch.eye(len(signs))
    assert correlation.abs().max() < SIX_SIGMA / math.sqrt(n)
    neighbours = (signs[:, 1:] * signs[:, :-1]).mean(1)
    assert neighbours.abs().max() < SIX_SIGMA / math.sqrt(n)
    assert torch.equal(
        rounding.random_bits(1000, 50, (3, 4), "cpu"),
        rounding.random_bits(0, 1050, (3, 4), "cpu")[1000:],
    )


@pytest.mark.parametrize("scale", [1e-45, 1e-38, 1e-20, 1.0, 1e30])
def test_a_code_is_a_neighbour_of_its_value(scale):
    generator = torch.Generator().manual_seed(0)
    values = scale * 10 ** (-12 * torch.rand(64, 256, generator=generator))
    values[0], values[1, 1:] = 0, 0
    uniform = torch.rand(64, 256, generator=generator)
    scales = rounding.block_scale(values)
    for encode, decode, largest, power in (
        (rounding.encode_m, rounding.decode_m, 127, 4),
        (rounding.encode_v, rounding.decode_v, 255, 8),
    ):
        codes = encode(values, scales, uniform)
        exact = largest * (values.double() / scales).pow(1 / power)
        assert ((codes - exact).abs() <= 1.001).all() and (codes[values == 0] == 0).all()
        assert codes.min() >= 0 and codes.max() <= largest
        decoded = decode(codes, scales)
        assert decoded.isfinite().all() and (decoded[values == 0] == 0).all()
        if scale >= rounding.SMALLEST_SCALE:
            largest_ones = values == scales
            torch.testing.assert_close(
                decoded[largest_ones], values[largest_ones], rtol=1e-6, atol=0
            )
    assert torch.equal(
        rounding.encode_m(-values, scales, uniform), -rounding.encode_m(values, scales, uniform)
    )


def power(codes: np.ndarray, largest: int, squarings: int) -> np.ndarray:
    """(codes/largest)^(2^squarings), every product rounded to fp32."""
    result = codes.astype(np.float32) * np.float32(1 / largest)
    for _ in range(squarings):
        result = result * result
    return result


def exact_codes(x: torch.Tensor, u: torch.Tensor, largest: int, squarings: int) -> tuple:
    """The code below each x and the rounded code by their definition, by search: no root."""
    powers = power(np.arange(largest + 2), largest, squarings)
    assert (np.diff(powers) > 0).all() and powers[largest] == 1
    below = np.searchsorted(powers, x.numpy(), side="right") - 1
    low, high = powers[below], powers[below + 1]
    return torch.tensor(below), torch.tensor(below + (u.numpy() * (high - low) < x.numpy() - low))


@pytest.mark.parametrize(
    ("encode", "largest", "squarings"), [("encode_m", 127, 2), ("encode_v", 255, 3)]
)
def test_codes_do_not_depend_on_the_guess_of_the_root(encode, largest, squarings):
    """At every code and its fp32 neighbours, at the limits, at denormals, and in between."""
    codes = torch.tensor(power(np.arange(largest + 1), largest, squarings))
    generator = torch.Generator().manual_seed(0)
    x = torch.cat(
        [
            codes,
            torch.nextafter(codes, torch.tensor(2.0)).clamp(max=1),
            torch.nextafter(codes, torch.tensor(0.0)),
            torch.tensor([0.0, 1e-45, 1e-40, 1.2e-38, 1.0]),
            torch.exp(-50 * torch.rand(2**16, generator=generator)),
        ]
    )
    random = rounding.uniforms(rounding.random_bits(0, len(x), (1, 2), "cpu"))[0]
    for u in (torch.full_like(x, 2**-17), torch.full_like(x, 1 - 2**-17), random):
        below, expected = exact_codes(x, u, largest, squarings)
        assert torch.equal(getattr(rounding, encode)(x, torch.ones(1), u), expected.float())
        root = largest * x.double().pow(0.5**squarings)
        estimates = root + 0.499 * (2 * torch.rand(len(x), generator=generator) - 1)
        for guess in (below, below + 1, estimates.round()):
            code = rounding._round_code(x, guess.float(), u, largest, squarings)
            assert torch.equal(code, expected.float())
    assert expected.min() == 0 and expected.max() == largest


def test_codes_mean_what_they_meant_in_checkpoints_of_before():
    scales = torch.tensor([[3e-30], [0.37], [1e20]])
    codes = np.arange(-127, 128)
    root = codes.astype(np.float32) * np.float32(1 / 127)
    square = root * abs(root)
    m = torch.from_numpy(square * abs(square)) * scales
    assert torch.equal(rounding.decode_m(torch.tensor(codes, dtype=torch.int8), scales), m)
    v = torch.from_numpy(power(np.arange(256), 255, 3)) * scales
    assert torch.equal(rounding.decode_v(torch.arange(256, dtype=torch.uint8), scales), v)


@pytest.mark.parametrize(("encode", "decode"), [("encode_m", "decode_m"), ("encode_v", "decode_v")])
def test_codes_keep_the_mean(encode, decode):
    n = 2**12
    generator = torch.Generator().manual_seed(0)
    values = (10 ** (-8 * torch.rand(256, generator=generator))).expand(n, 256)
    scales = torch.ones(n, 1)
    uniform = rounding.uniforms(rounding.random_bits(0, n * 256, (5, 6), "cpu"))[0].view(n, 256)
    codes = getattr(rounding, encode)(values, scales, uniform)
    decoded = getattr(rounding, decode)(codes, scales).double()
    error = (decoded.mean(0) - values[0]).abs()
    gap = decoded.amax(0) - decoded.amin(0)
    assert (error <= SIX_SIGMA * gap / 2 / math.sqrt(n) + 1e-6 * values[0]).all()
