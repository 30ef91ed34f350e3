"""Rounding at random with the right mean: fp32 to bf16, and to the 8-bit codes of AdamW's states.

A value x between two neighbours becomes the upper one with probability (x − low)/(high − low). The
random numbers are a hash of the element's index and two keys in 32-bit arithmetic, and depend on
nothing else: they are the same on every device, and after a resume. step_triton.py has the same
operations for a GPU, with the same bits.

A code c of L stands for p(c) = (c/L)⁴ or (c/L)⁸ times its block's scale. p is c·fl(1/L), squared
twice or thrice, each product rounded to fp32, and so the same number everywhere. With x the value
times fl(1/scale), and u random in (0, 1),

    k = the largest code with p(k) ≤ x
    code = k + 1 if u·(p(k+1) − p(k)) < x − p(k), else k

each operation rounded to fp32. To find k without a search, the root of x times L is guessed and
rounded to the nearest code g; then k is g − 1 if p(g) > x, else g. That is k for each guess that is
k or k + 1, so for each estimate of L·root(x) that is off by less than 1/2 (the estimates here are
off by 1e-4 at most). Thus codes do not depend on how a device takes roots.

The limits hold without special cases. x = 0 gives the code 0. x cannot exceed 1, nor be less than
1 − 2⁻²⁴ for a block's largest value; p(L) is 1, and u at most 1 − 2⁻¹⁷, so that its code is L. A
device may take a denormal x for 0 in its guess, because p(1) is far above. Values that are not
finite have no defined code.
"""

import hashlib
import struct

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
    return torch.copysign(_power(codes, 127, 2), codes) * scale


def decode_v(codes: torch.Tensor, scale: torch.Tensor) -> torch.Tensor:
    """Decode codes 0…255 (blocks, 256) in fp32 with scales (blocks, 1)."""
    return _power(codes, 255, 3) * scale


def encode_m(m: torch.Tensor, scale: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Encode m (blocks, 256) with scales (blocks, 1) as codes −127…127 in fp32.

    `uniform` (blocks, 256) in (0, 1) decides which way each value is rounded.
    """
    return torch.copysign(_encode(m.abs(), scale, uniform, 127, 2), m)


def encode_v(v: torch.Tensor, scale: torch.Tensor, uniform: torch.Tensor) -> torch.Tensor:
    """Encode v (blocks, 256) with scales (blocks, 1) as codes 0…255 in fp32.

    `uniform` (blocks, 256) in (0, 1) decides which way each value is rounded.
    """
    return _encode(v, scale, uniform, 255, 3)


def _encode(
    values: torch.Tensor, scale: torch.Tensor, uniform: torch.Tensor, largest: int, squarings: int
) -> torch.Tensor:
    """Encode values ≥ 0 as the code below or, with the right probability, as the code above."""
    x = values * scale.reciprocal()
    guess = x.clone()
    for _ in range(squarings):
        guess.sqrt_()
    return _round_code(x, guess.mul_(largest).round_(), uniform, largest, squarings)


def _round_code(
    x: torch.Tensor, guess: torch.Tensor, uniform: torch.Tensor, largest: int, squarings: int
) -> torch.Tensor:
    """Round x in 0 … 1 to the code below or above; the guess is one of them, and overwritten.

    Comparisons are in place, in fp32: with a tensor of bools, sums take three times as long.
    """
    code = guess.sub_(_power(guess, largest, squarings).gt_(x))
    low, high = (_power(each, largest, squarings) for each in (code, code + 1))
    return code.add_(high.sub_(low).mul_(uniform).lt_(x - low))


def _power(codes: torch.Tensor, largest: int, squarings: int) -> torch.Tensor:
    """Raise |codes|/largest to the power 2^squarings, products rounded to fp32 one by one."""
    power = codes * (1 / largest)
    for _ in range(squarings):
        power.square_()
    return power


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


def from_element(first: int, keys: tuple[int, int]) -> tuple[int, int]:
    """Return the keys by which element 0 gets the bits that element `first` has by `keys`."""
    return _signed(keys[0] + first), keys[1]


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
