"""The step of AdamW in Triton: device functions, kernels, launchers.

A program owns a tile of whole blocks, so it needs no scales from other programs, and everything is
read and written once. What changes from step to step (learning rate, bias correction, keys) is
run-time data, so nothing is compiled again. Products and sums are not contracted into fused
operations: the bits are those of PyTorch on a CPU. The only roots that a device approximates are
guesses of codes, and rounding.py says why codes do not depend on them.

A step is bound by instructions rather than by memory. So fp32 integers are rounded and stored by
the bits of a sum with `_MAGIC`: conversions run at a fraction of the speed of sums.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from triton.runtime import driver

from ..launch import launch
from ..tuned import tuned
from .rounding import HASH, SMALLEST_SCALE
from .state import BLOCK, Scalars, State


class AdamWTile(NamedTuple):
    """How the step is launched."""

    rows: int
    """Blocks of 256 elements in a program's tile."""
    warps: int


ADAMW_VARIANTS = (
    AdamWTile(4, 4),
    AdamWTile(2, 2),
    AdamWTile(1, 1),
    AdamWTile(4, 2),
    AdamWTile(8, 4),
)
"""What a sweep on an NVIDIA GPU tries; the first is the default there.

With 8 elements a thread, the first three, at most 127 registers let 16 to 20 warps share a
multiprocessor; 16 elements a thread need 8 % fewer instructions, and leave room for 8 to 12 warps.
"""
INTERPRETED_TILE = AdamWTile(64, 4)
"""Triton's interpreter takes its time for every program, so it gets few."""
SUM_ELEMENTS, SUM_WARPS = 1024, 2
"""Elements and warps of a program that adds gradients: 16 elements a thread."""
_BLOCK = tl.constexpr(BLOCK)
_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)
_HASH0, _HASH1, _HASH2 = (tl.constexpr(each) for each in HASH)
_MAGIC = tl.constexpr(1.5 * 2**23)  # neighbours of this fp32 number are 1 apart

# --- device functions ---------------------------------------------------------------------------


@triton.jit
def _random_bits(index, key0, key1):
    """Draw 32 random bits for each uint32 index; all arithmetic is modulo 2^32."""
    x = tl.add(index, key0.to(tl.uint32), sanitize_overflow=False)
    x = tl.mul(x ^ (x >> 16), _HASH0, sanitize_overflow=False)
    x = tl.add(x, key1.to(tl.uint32), sanitize_overflow=False)
    x = tl.mul(x ^ (x >> 15), _HASH1, sanitize_overflow=False)
    return x ^ (x >> 16)


@triton.jit
def _uniforms(bits):
    """Make two fp32 numbers in (0, 1) of the two halves of each 32 bits: 2⁻¹⁷, 3·2⁻¹⁷, …

    The bits of 2²³ are 0x4B000000, so that h | 0x4B000000 is 2²³ + h for a half h. What follows is
    exact.
    """
    low = (bits & 0xFFFF | 0x4B000000).to(tl.float32, bitcast=True)
    high = (bits >> 16 | 0x4B000000).to(tl.float32, bitcast=True)
    return tl.fma(low, 2**-16, 2**-17 - 2**7), tl.fma(high, 2**-16, 2**-17 - 2**7)


@triton.jit
def _more_bits(bits):
    """Draw 16 further random bits from 32."""
    return tl.mul(bits ^ (bits >> 15), _HASH2, sanitize_overflow=False) >> 16


@triton.jit
def _round_stochastically(x, bits):
    """Round fp32 to bf16, whose bits are returned in int16. NaN stays NaN."""
    bits = tl.where(x == x, bits.to(tl.int32), 0)
    return ((x.to(tl.int32, bitcast=True) + bits) >> 16).to(tl.int16)


@triton.jit
def _power(root, SQUARINGS: tl.constexpr):
    """Raise to the power of 2^SQUARINGS."""
    for _ in tl.static_range(SQUARINGS):
        root = root * root
    return root


@triton.jit
def _guess(x, LARGEST: tl.constexpr, SQUARINGS: tl.constexpr):
    """Guess the code of x in 0 … 1, (ROWS, 256), as the nearest to an approximate root."""
    for _ in tl.static_range(SQUARINGS):
        x = tl.sqrt(x)
    return tl.fma(x, LARGEST, _MAGIC) - _MAGIC


@triton.jit
def _encode(values, scale, uniform, LARGEST: tl.constexpr, SQUARINGS: tl.constexpr):
    """Encode values ≥ 0 (ROWS, 256) with scales (ROWS,) as codes 0 … LARGEST in fp32.

    `uniform` (ROWS, 256) decides which way each value is rounded. The result is that of
    rounding.py, whose code below x and the next one are here the guess and its neighbour towards x.
    """
    x = values * tl.div_rn(1.0, scale)[:, None]
    guess = _guess(x, LARGEST, SQUARINGS)
    power = _power(guess * (1 / LARGEST), SQUARINGS)
    below = x >= power
    other = guess + tl.where(below, 1.0, -1.0)
    other_power = _power(other * (1 / LARGEST), SQUARINGS)
    low = tl.minimum(power, other_power)
    up = uniform * tl.abs(power - other_power) < x - low
    return tl.where(up == below, other, guess)


@triton.jit
def _integer(code):
    """Convert fp32 integers −2¹⁵ … 2¹⁵ − 1 to int32 whose low 16 bits are theirs."""
    return (code + _MAGIC).to(tl.int32, bitcast=True)


# --- kernels ------------------------------------------------------------------------------------

_STEP_SCALARS = ["key0", "key1"]


@triton.jit(do_not_specialize=_STEP_SCALARS, do_not_specialize_on_alignment=["GRAD_SCALE"])
def _adamw_kernel(WEIGHT, GRADIENT, M, V, M_SCALE, V_SCALE, REMAINDER, GRAD_SCALE, n,
                  lr, weight_decay, beta1, one_minus_beta1, beta2, one_minus_beta2,
                  inverse_correction1, inverse_correction2, eps, limit, key0, key1,
                  TILE: tl.constexpr):  # fmt: skip
    """Update the TILE elements of whole blocks at TILE·program_id; n elements in all."""
    ROWS: tl.constexpr = TILE // _BLOCK
    row = tl.program_id(0).to(tl.int64) * ROWS
    rows = tl.arange(0, ROWS)
    start = row * _BLOCK
    inside = rows[:, None] * _BLOCK + tl.arange(0, _BLOCK)[None, :]
    mask = start + inside < n
    rows_mask = start + rows * _BLOCK < n
    gradient = tl.load(GRADIENT + start + inside, mask=mask, other=0.0).to(tl.float32)
    if GRAD_SCALE is not None:
        gradient = gradient * tl.load(GRAD_SCALE)
    if REMAINDER is not None:
        high = tl.load(WEIGHT + start + inside, mask=mask, other=0).to(tl.int32) << 16
        remainder = tl.load(REMAINDER + start + inside, mask=mask, other=0).to(tl.int32)
        weight = (high + remainder).to(tl.float32, bitcast=True)
    elif WEIGHT.dtype.element_ty == tl.int16:
        high = tl.load(WEIGHT + start + inside, mask=mask, other=0).to(tl.int32) << 16
        weight = high.to(tl.float32, bitcast=True)
    else:
        weight = tl.load(WEIGHT + start + inside, mask=mask, other=0.0)

    m_code = tl.load(M + start + inside, mask=mask, other=0).to(tl.float32)
    m_root = m_code * (1 / 127)
    m_square = m_root * tl.abs(m_root)
    m = m_square * tl.abs(m_square)
    m = m * tl.load(M_SCALE + row + rows, mask=rows_mask, other=0.0)[:, None]
    m = m * beta1 + gradient * one_minus_beta1
    v_code = tl.load(V + start + inside, mask=mask, other=0).to(tl.float32)
    v = _power(v_code * (1 / 255), 3)
    v = v * tl.load(V_SCALE + row + rows, mask=rows_mask, other=0.0)[:, None]
    v = v * beta2 + gradient * one_minus_beta2 * gradient

    m_scale = tl.maximum(tl.max(tl.abs(m), 1), _SMALLEST_SCALE)
    v_scale = tl.maximum(tl.max(v, 1), _SMALLEST_SCALE)
    smallest = (v_scale * _power(tl.full((ROWS,), 1 / 255, tl.float32), 3))[:, None]
    denominator = tl.sqrt_rn(tl.maximum(v, smallest) * inverse_correction2) + eps
    ratio = tl.div_rn(m * inverse_correction1, denominator)
    ratio = tl.minimum(tl.maximum(ratio, -limit), limit)
    weight = weight - (weight * weight_decay + ratio) * lr

    index = tl.add(start.to(tl.uint32), inside.to(tl.uint32), sanitize_overflow=False)
    bits = _random_bits(index, key0, key1)
    m_uniform, v_uniform = _uniforms(bits)
    m_code = _encode(tl.abs(m), m_scale, m_uniform, 127, 2)
    v_code = _encode(v, v_scale, v_uniform, 255, 3)
    sign = m.to(tl.int32, bitcast=True) & -(2**31)
    m_code = (m_code.to(tl.int32, bitcast=True) | sign).to(tl.float32, bitcast=True)
    tl.store(M + start + inside, _integer(m_code).to(tl.int8), mask=mask)
    tl.store(V + start + inside, _integer(v_code).to(tl.uint8), mask=mask)
    tl.store(M_SCALE + row + rows, m_scale, mask=rows_mask)
    tl.store(V_SCALE + row + rows, v_scale, mask=rows_mask)
    if REMAINDER is not None:
        master = weight.to(tl.int32, bitcast=True)
        high = (master + 0x8000) >> 16
        tl.store(WEIGHT + start + inside, high.to(tl.int16), mask=mask)
        tl.store(REMAINDER + start + inside, (master - (high << 16)).to(tl.int16), mask=mask)
    elif WEIGHT.dtype.element_ty == tl.int16:
        rounded = _round_stochastically(weight, _more_bits(bits))
        tl.store(WEIGHT + start + inside, rounded, mask=mask)
    else:
        tl.store(WEIGHT + start + inside, weight, mask=mask)


@triton.jit(do_not_specialize=_STEP_SCALARS)
def _add_stochastic_kernel(ACCUMULATOR, GRADIENT, n, key0, key1, SIZE: tl.constexpr):
    """Add SIZE of n gradients to the accumulator, bf16 as int16."""
    start = tl.program_id(0).to(tl.int64) * SIZE
    inside = tl.arange(0, SIZE)
    mask = start + inside < n
    high = tl.load(ACCUMULATOR + start + inside, mask=mask, other=0).to(tl.int32) << 16
    gradient = tl.load(GRADIENT + start + inside, mask=mask, other=0.0).to(tl.float32)
    total = high.to(tl.float32, bitcast=True) + gradient
    index = tl.add(start.to(tl.uint32), inside.to(tl.uint32), sanitize_overflow=False)
    bits = _random_bits(index, key0, key1)
    rounded = _round_stochastically(total, _more_bits(bits))
    tl.store(ACCUMULATOR + start + inside, rounded, mask=mask)


# --- launchers ----------------------------------------------------------------------------------


def adamw_(
    weight: torch.Tensor,
    gradient: torch.Tensor,
    state: State,
    scalars: Scalars,
    keys: tuple[int, int],
    grad_scale: torch.Tensor | None,
    tile: AdamWTile | None = None,
) -> None:
    """`step.adamw_` for flat contiguous tensors, with a program for each tile (None: the best)."""
    n = len(weight)
    tile = tile or _tile(weight.device)
    launch(
        _adamw_kernel, (triton.cdiv(n, tile.rows * BLOCK),), weight.device,
        _bits(weight), gradient, state.m, state.v, state.m_scale, state.v_scale, state.remainder,
        grad_scale, n, *scalars, *keys,
        TILE=tile.rows * BLOCK, num_warps=tile.warps, enable_fp_fusion=False,
    )  # fmt: skip


def add_stochastic_(
    accumulator: torch.Tensor, gradient: torch.Tensor, keys: tuple[int, int]
) -> None:
    """`step.add_stochastic_` for flat contiguous tensors."""
    n, size = len(accumulator), SUM_ELEMENTS
    if triton.knobs.runtime.interpret:
        size = INTERPRETED_TILE.rows * BLOCK
    launch(
        _add_stochastic_kernel, (triton.cdiv(n, size),), accumulator.device,
        _bits(accumulator), gradient, n, *keys,
        SIZE=size, num_warps=SUM_WARPS, enable_fp_fusion=False,
    )  # fmt: skip


def _tile(device: torch.device) -> AdamWTile:
    """Choose the tile of a step."""
    if triton.knobs.runtime.interpret:
        return INTERPRETED_TILE
    # 128 threads with 8 elements each; AMD's warps have 64 threads.
    warps = 128 // driver.active.get_current_target().warp_size
    return tuned("adamw", device, AdamWTile(4, warps))


def _bits(weight: torch.Tensor) -> torch.Tensor:
    """View a bf16 weight as int16, which the kernels work on; leave an fp32 weight as it is."""
    return weight.view(torch.int16) if weight.dtype == torch.bfloat16 else weight
