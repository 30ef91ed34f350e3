"""The step of AdamW in Triton: device functions, kernels, launchers.

A program owns a tile of whole blocks, so it needs no scales from other programs, and everything is
read and written once. What changes from step to step (learning rate, bias correction, keys) is
run-time data, so nothing is compiled again. Products and sums are not contracted into fused
operations: the bits are those of PyTorch on a CPU.
"""

import torch
import triton
import triton.language as tl

from ..launch import launch
from .rounding import HASH, SMALLEST_SCALE
from .state import BLOCK, Scalars, State

ROWS = 4
"""Blocks of 256 elements in a program's tile: 16 elements a thread, 128 bits of 8-bit states."""
INTERPRETED_ROWS = 64
"""Blocks in a program's tile under Triton's interpreter, which takes its time for every program."""
OPTIONS = dict(num_warps=2, enable_fp_fusion=False)
"""Options of the launches; without fusion, a product and a sum are rounded one after the other."""
_BLOCK = tl.constexpr(BLOCK)
_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)
_HASH0, _HASH1, _HASH2 = (tl.constexpr(each) for each in HASH)

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
def _encode(values, scale, random16, LARGEST: tl.constexpr, SQUARINGS: tl.constexpr):
    """Encode values ≥ 0 (ROWS, 256) with scales (ROWS,) as codes 0 … LARGEST in fp32.

    `random16` decides which way each value is rounded, so that the mean is right.
    """
    x = values * tl.div_rn(1.0, scale)[:, None]
    root = x
    for _ in tl.static_range(SQUARINGS):
        root = tl.sqrt_rn(root)
    code = tl.minimum(tl.floor(root * LARGEST), LARGEST - 1)
    low = _power(code * (1 / LARGEST), SQUARINGS)
    high = _power((code + 1) * (1 / LARGEST), SQUARINGS)
    uniform = random16.to(tl.float32) * (1 / 65536) + (1 / 131072)
    return code + tl.where(uniform * (high - low) < x - low, 1.0, 0.0)


# --- kernels ------------------------------------------------------------------------------------

_STEP_SCALARS = ["key0", "key1"]


@triton.jit(do_not_specialize=_STEP_SCALARS, do_not_specialize_on_alignment=["GRAD_SCALE"])
def _adamw_kernel(WEIGHT, GRADIENT, M, V, M_SCALE, V_SCALE, REMAINDER, GRAD_SCALE, n,
                  lr, weight_decay, beta1, one_minus_beta1, beta2, one_minus_beta2,
                  inverse_correction1, inverse_correction2, eps, limit, key0, key1,
                  ROWS: tl.constexpr):  # fmt: skip
    """Update the tile of ROWS blocks at ROWS·program_id; n elements in all."""
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
    m_square = _power(m_code * (1 / 127), 1)
    m = m_square * m_square * tl.load(M_SCALE + row + rows, mask=rows_mask, other=0.0)[:, None]
    m = tl.where(m_code < 0, -m, m) * beta1 + gradient * one_minus_beta1
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
    m_code = _encode(tl.abs(m), m_scale, bits & 0xFFFF, 127, 2)
    v_code = _encode(v, v_scale, bits >> 16, 255, 3)
    tl.store(M + start + inside, tl.where(m < 0, -m_code, m_code).to(tl.int8), mask=mask)
    tl.store(V + start + inside, v_code.to(tl.int32).to(tl.uint8), mask=mask)
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
) -> None:
    """`step.adamw_` for flat contiguous tensors, with a program for each `ROWS` blocks."""
    n, rows = len(weight), _rows()
    launch(
        _adamw_kernel, (triton.cdiv(n, rows * BLOCK),), weight.device,
        _bits(weight), gradient, state.m, state.v, state.m_scale, state.v_scale, state.remainder,
        grad_scale, n, *scalars, *keys, ROWS=rows, **OPTIONS,
    )  # fmt: skip


def add_stochastic_(
    accumulator: torch.Tensor, gradient: torch.Tensor, keys: tuple[int, int]
) -> None:
    """`step.add_stochastic_` for flat contiguous tensors, with a program for each `ROWS` blocks."""
    n, size = len(accumulator), _rows() * BLOCK
    launch(
        _add_stochastic_kernel, (triton.cdiv(n, size),), accumulator.device,
        _bits(accumulator), gradient, n, *keys, SIZE=size, **OPTIONS,
    )  # fmt: skip


def _rows() -> int:
    """Choose the blocks of a program's tile."""
    return INTERPRETED_ROWS if triton.knobs.runtime.interpret else ROWS


def _bits(weight: torch.Tensor) -> torch.Tensor:
    """View a bf16 weight as int16, which the kernels work on; leave an fp32 weight as it is."""
    return weight.view(torch.int16) if weight.dtype == torch.bfloat16 else weight
