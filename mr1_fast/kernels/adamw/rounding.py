"""Rounding at random with the right mean: fp32 to bf16, and to the 8-bit codes of AdamW's states.

A value x between two neighbours becomes the upper one with probability (x − low)/(high − low). The
random numbers are a hash of the element's index and two keys in 32-bit arithmetic, and depend on
nothing else: they are the same on every device, and after a resume. step_triton.py has the same
operations for a GPU, with the same bits.
"""

import hashlib
import struct
from collections.abc import Callable

import numpy as np
import torch

SMALLEST_SCALE = 1e-30
"""Scale of a block whose states are all 0, so that no division is by 0."""
HASH = (0x7FEB352D, 0x846CA68B, 0x9E3779B1)
"""Multipliers of the hash: lowbias32's two (github.com/skeeto/hash-prospector), and 2³²/φ, odd."""


# --- codes --------------------------------------------------------------------------------------


def block_scale(values: torch.Tensor) -> torch.Tensor:
    """Find the largest magnitude of each block: (blocks, 1) for values (blocks, 256)."""
    return values.abs().amax(1, keepdim=True).clamp_(min=SMALLEST_SCALE)


def decode_m(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Decode codes −127…127 (blocks, 256) in fp32 with scales (blocks, 1)."""
    root = codes * (1 / 127)
    square = root * root.abs()
    return square * square.abs() * scale


def decode_v(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Decode codes 0…255 (blocks, 256) in fp32 with scales (blocks, 1)."""
    return (codes * (1 / 255)).square_().square_().square_() * scale


def encode_m(m: torch.Tensor, scale: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Encode m (blocks, 256) with scales (blocks, 1) as codes −127…127 in fp32.

    `uniform` (blocks, 256) in (0, 1) decides which way each value is rounded.
    """
    return torch.copysign(_encode(m.abs(), scale, uniform, 127, 2, decode_m), m)


def encode_v(v: torch.Tensor, scale: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Encode v (blocks, 256) with scales (blocks, 1) as codes 0…255 in fp32.

    `uniform` (blocks, 256) in (0, 1) decides which way each value is rounded.
    """
    return _encode(v, scale, uniform, 255, 3, decode_v)


def _encode(
    values: torch.Tensor,
    scale: torch.Tensor,
    uniform: torch.Tensor,
    largest: int,
    roots: int,
    decode: Callable[[torch.Tensor, torch.Tensor], torch.Tensor],
) -> torch.Tensor:
    """Encode values ≥ 0 as the code below or, with the right probability, as the code above.

    The probability is (x − low)/(high − low), so that the mean of the decoded code is x. `roots`
    square roots undo the power that `decode` takes.
    """
    x = values * scale.reciprocal()
    root = x
    for _ in range(roots):
        root = sqrt_(root.clone() if root is x else root)
    code = root.mul_(largest).floor_().clamp_(max=largest - 1)
    one = torch.ones_like(scale)
    low, high = decode(code, one), decode(code + 1, one)
    return code.add_(uniform * high.sub_(low) < x.sub_(low))


def sqrt_(x: torch.Tensor) -> torch.Tensor:
    """Take the square root in place, correctly rounded.

    PyTorch's own on a CPU, by MKL, is one bit off in 0.7 % of all cases; NumPy's is exact.
    """
    if x.device.type != "cpu":
        return x.sqrt_()
    np.sqrt(x.numpy(), out=x.numpy())
    return x


# --- random numbers -----------------------------------------------------------------------------


def random_keys(*parts: int) -> tuple[int, int]:
    """Derive two signed 32-bit keys from all of `parts`, for example (seed, parameter, step)."""
    return struct.unpack("<ii", hashlib.blake2b(repr(parts).encode(), digest_size=8).digest())


def random_bits(first: int, n: int, keys: tuple[int, int], device: torch.device) -> torch.Tensor:
    """Draw 32 random bits for each of the elements `first` … `first` + n − 1: (n,) int32.

    The hash is lowbias32 of the element's index, with the second key mixed in between its rounds.
    """
    x = torch.arange(n, dtype=torch.int32, device=device)
    x += _signed(first + keys[0])
    x ^= (x >> 16) & 0xFFFF  # int32 shifts its sign in
    x *= HASH[0]
    x += keys[1]
    x ^= (x >> 15) & 0x1FFFF
    x *= _signed(HASH[1])
    return x.bitwise_xor_((x >> 16) & 0xFFFF)


def uniforms(bits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Make two fp32 numbers in (0, 1) of the two halves of each 32 bits: 2⁻¹⁷, 3·2⁻¹⁷, …"""
    return (bits & 0xFFFF) * 2**-16 + 2**-17, ((bits >> 16) & 0xFFFF) * 2**-16 + 2**-17


def more_bits(bits: torch.Tensor) -> torch.Tensor:
    """Draw 16 further random bits, in int32, from 32 by another round of mixing."""
    return ((bits ^ ((bits >> 15) & 0x1FFFF)) * _signed(HASH[2]) >> 16) & 0xFFFF


def round_stochastically(x: torch.Tensor, bits: torch.Tensor) -> torch.Tensor:
    """Round fp32 to bf16, up or down so that the mean is x, by 16 random `bits`. NaN stays NaN."""
    bits = torch.where(x.isnan(), 0, bits)  # a carry would turn some NaN into 0
    return ((x.view(torch.int32) + bits) >> 16).to(torch.int16).view(torch.bfloat16)


def _signed(number: int) -> int:
    """Reinterpret the low 32 bits of a number as int32."""
    return (number + 2**31) % 2**32 - 2**31
