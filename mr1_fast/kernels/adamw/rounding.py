"""Rounding at random with the right mean: fp32 to bf16, and to the 8-bit codes of AdamW's states (adamw.py).

A value between two neighbours becomes the upper one with probability (x − low)/(high − low). The random numbers are a
hash of the element's index and two keys, in 32-bit arithmetic, and nothing else: the same on every device, and after a
resume. step_triton.py has the same operations.
"""

import hashlib
import struct

import numpy as np
import torch

SMALLEST_SCALE = 1e-30
"""Of a block whose state is 0: what is divided by is never 0."""
HASH = (0x7FEB352D, 0x846CA68B, 0x9E3779B1)
"""Multipliers: the first two are those of lowbias32 (github.com/skeeto/hash-prospector), the last is odd, 2³²/φ."""


# --- codes ----------------------------------------------------------------------------------------------------------


def block_scale(values: torch.Tensor) -> torch.Tensor:
    """(blocks, 1) largest magnitude in each block of (blocks, 256)."""
    return values.abs().amax(1, keepdim=True).clamp_(min=SMALLEST_SCALE)


def decode_m(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Fp32 values (blocks, 256) of codes −127…127 with scales (blocks, 1)."""
    root = codes * (1 / 127)
    square = root * root.abs()
    return square * square.abs() * scale


def decode_v(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Fp32 values (blocks, 256) of codes 0…255 with scales (blocks, 1)."""
    return (codes * (1 / 255)).square_().square_().square_() * scale


def encode_m(m: torch.Tensor, scale: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Codes −127…127 in fp32 of m (blocks, 256) with their scales; `uniform` in (0, 1) rounds them."""
    return torch.copysign(_encode(m.abs(), scale, uniform, 127, 2, decode_m), m)


def encode_v(v: torch.Tensor, scale: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Codes 0…255 in fp32 of v (blocks, 256) with their scales; `uniform` in (0, 1) rounds them."""
    return _encode(v, scale, uniform, 255, 3, decode_v)


def _encode(
    values: torch.Tensor,
    scale: torch.Tensor,
    uniform: torch.Tensor,
    largest: int,
    roots: int,
    decode,
):
    """The code below, or with probability (x − low)/(high − low) the one above, so that the mean is x."""
    x = values * scale.reciprocal()
    root = x
    for _ in range(roots):
        root = sqrt_(root.clone() if root is x else root)
    code = root.mul_(largest).floor_().clamp_(max=largest - 1)
    one = torch.ones_like(scale)
    low, high = decode(code, one), decode(code + 1, one)
    return code.add_(uniform * high.sub_(low) < x.sub_(low))


def sqrt_(x: torch.Tensor) -> torch.Tensor:
    """In place, correctly rounded: PyTorch's on CPUs, by MKL, is one bit off in 0.7 % of all cases."""
    if x.device.type != "cpu":
        return x.sqrt_()
    np.sqrt(x.numpy(), out=x.numpy())
    return x


# --- random numbers -----------------------------------------------------------------------------------------------


def random_keys(*parts: int) -> tuple[int, int]:
    """Two 32-bit keys, signed, that depend on all of `parts`, for example (seed, parameter, step)."""
    return struct.unpack("<ii", hashlib.blake2b(repr(parts).encode(), digest_size=8).digest())


def random_bits(first: int, n: int, keys: tuple[int, int], device: torch.device) -> torch.Tensor:
    """(n,) int32, 32 random bits for each of the elements first … first+n−1: lowbias32 with a second key inside."""
    x = torch.arange(n, dtype=torch.int32, device=device)
    x += _signed(first + keys[0])
    x ^= (x >> 16) & 0xFFFF  # int32 shifts its sign in
    x *= HASH[0]
    x += keys[1]
    x ^= (x >> 15) & 0x1FFFF
    x *= _signed(HASH[1])
    return x.bitwise_xor_((x >> 16) & 0xFFFF)


def uniforms(bits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Two fp32 numbers in (0, 1) from the two halves of the bits: 2⁻¹⁷, 3·2⁻¹⁷, …"""
    return (bits & 0xFFFF) * 2**-16 + 2**-17, ((bits >> 16) & 0xFFFF) * 2**-16 + 2**-17


def more_bits(bits: torch.Tensor) -> torch.Tensor:
    """16 bits, in int32, of another mixing."""
    return ((bits ^ ((bits >> 15) & 0x1FFFF)) * _signed(HASH[2]) >> 16) & 0xFFFF


def round_stochastically(x: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """fp32 → bf16, up or down so that the mean is x; `bits` are 16 random ones. NaN stays NaN."""
    bits = torch.where(x.isnan(), 0, bits)  # the carry would turn some NaN into 0
    return ((x.view(torch.int32) + bits) >> 16).to(torch.int16).view(torch.bfloat16)


def _signed(number: int) -> int:
    """The low 32 bits as int32."""
    return (number + 2**31) % 2**32 - 2**31
