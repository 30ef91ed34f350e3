"""The step of adamw.py in Triton: device functions, kernels, launchers.

A program owns a tile of whole blocks, so the scales need nothing from other programs, and everything is read and
written once. What changes from step to step (learning rate, bias correction, keys) is run-time data: nothing is
compiled again. Launched without contraction of products and sums into fused ones: the bits are those of PyTorch.
"""

import torch
import triton
import triton.language as tl

from .rounding import HASH, SMALLEST_SCALE
from .state import BLOCK, Scalars, State

ROWS = 4
"""Blocks of 256 elements in a program's tile: 16 elements a thread, 128 bits of 8-bit states."""
NUM_WARPS = 2
INTERPRETED = bool(triton.knobs.runtime.interpret)
_BLOCK = tl.constexpr(BLOCK)
_SMALLEST_SCALE = tl.constexpr(SMALLEST_SCALE)
_HASH0, _HASH1, _HASH2 = (tl.constexpr(each) for each in HASH)

# --- device functions ---------------------------------------------------------------------------------------------


@triton.jit
def _random_bits(index, key0, key1):
    """32 random bits for each uint32 index; all arithmetic is modulo 2^32."""
    x = tl.add(index, key0.to(tl.uint32), sanitize_overflow=False)
    x = tl.mul(x ^ (x >> 16), _HASH0, sanitize_overflow=False)
    x = tl.add(x, key1.to(tl.uint32), sanitize_overflow=False)
    x = tl.mul(x ^ (x >> 15), _HASH1, sanitize_overflow=False)
    return x ^ (x >> 16)


@triton.jit
def _more_bits(bits):
    return tl.mul(bits ^ (bits >> 15), _HASH2, sanitize_overflow=False) >> 16


@triton.jit
def _round_stochastically(x, bits):
    """fp32 → the bits of bf16, in int16."""
    bits = tl.where(x == x, bits.to(tl.int32), 0)
    return ((x.to(tl.int32, bitcast=True) + bits) >> 16).to(tl.int16)


@triton.jit
def _power(root, SQUARINGS: tl.constexpr):
    for _ in tl.static_range(SQUARINGS):
        root = root * root
    return root


@triton.jit
def _encode(values, scale, random16, LARGEST: tl.constexpr, SQUARINGS: tl.constexpr):
    """fp32 codes 0 … LARGEST of values ≥ 0 (ROWS, 256) with scales (ROWS,), rounded so that the mean is right."""
    x = values * tl.div_rn(1.0, scale)[:, None]
    root = x
    for _ in tl.static_range(SQUARINGS):
        root = tl.sqrt_rn(root)
    code = tl.minimum(tl.floor(root * LARGEST), LARGEST - 1)
    low = _power(code * (1 / LARGEST), SQUARINGS)
    high = _power((code + 1) * (1 / LARGEST), SQUARINGS)
    uniform = random16.to(tl.float32) * (1 / 65536) + (1 / 131072)
    return code + tl.where(uniform * (high - low) < x - low, 1.0, 0.0)


# --- kernels ------------------------------------------------------------------------------------------------------

_STEP_SCALARS = ["key0", "key1"]


@triton.jit(do_not_specialize=_STEP_SCALARS, do_not_specialize_on_alignment=["GRAD_SCALE"])
def _adamw_kernel(WEIGHT, GRADIENT, M, V, M_SCALE, V_SCALE, REMAINDER, GRAD_SCALE, n,
                  lr, weight_decay, beta1, one_minus_beta1, beta2, one_minus_beta2, inverse_correction1,
                  inverse_correction2, eps, limit, key0, key1, ROWS: tl.constexpr):  # fmt: skip
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
    v = (
        _power(v_code * (1 / 255), 3)
        * tl.load(V_SCALE + row + rows, mask=rows_mask, other=0.0)[:, None]
    )
    v = v * beta2 + gradient * one_minus_beta2 * gradient

    m_scale = tl.maximum(tl.max(tl.abs(m), 1), _SMALLEST_SCALE)
    v_scale = tl.maximum(tl.max(v, 1), _SMALLEST_SCALE)
    smallest = (v_scale * _power(tl.full((ROWS,), 1 / 255, tl.float32), 3))[:, None]
    denominator = tl.sqrt_rn(tl.maximum(v, smallest) * inverse_correction2) + eps
    ratio = tl.div_rn(m * inverse_correction1, denominator)
    ratio = tl.minimum(tl.maximum(ratio, -limit), limit)
    weight = weight - (weight * weight_decay + ratio) * lr

    bits = _random_bits(
        tl.add(start.to(tl.uint32), inside.to(tl.uint32), sanitize_overflow=False), key0, key1
    )
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
        tl.store(
            WEIGHT + start + inside, _round_stochastically(weight, _more_bits(bits)), mask=mask
        )
    else:
        tl.store(WEIGHT + start + inside, weight, mask=mask)


@triton.jit(do_not_specialize=_STEP_SCALARS)
def _add_stochastic_kernel(ACCUMULATOR, GRADIENT, n, key0, key1, SIZE: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * SIZE
    inside = tl.arange(0, SIZE)
    mask = start + inside < n
    total = (tl.load(ACCUMULATOR + start + inside, mask=mask, other=0).to(tl.int32) << 16).to(
        tl.float32, bitcast=True
    )
    total = total + tl.load(GRADIENT + start + inside, mask=mask, other=0.0).to(tl.float32)
    bits = _random_bits(
        tl.add(start.to(tl.uint32), inside.to(tl.uint32), sanitize_overflow=False), key0, key1
    )
    tl.store(
        ACCUMULATOR + start + inside, _round_stochastically(total, _more_bits(bits)), mask=mask
    )


# --- launchers ----------------------------------------------------------------------------------------------------


def adamw_(
    weight, gradient, state: State, scalars: Scalars, keys: tuple[int, int], grad_scale
) -> None:
    """`adamw.adamw_` for flat contiguous tensors: one program per `ROWS` blocks."""
    rows = 64 if INTERPRETED else ROWS
    _launch(_adamw_kernel, triton.cdiv(len(weight), rows * BLOCK), weight,
        _bits(weight), gradient, state.m, state.v, state.m_scale, state.v_scale, state.remainder, grad_scale,
        len(weight), *scalars, *keys, ROWS=rows,
    )  # fmt: skip


def add_stochastic_(accumulator, gradient, keys: tuple[int, int]) -> None:
    """`adamw.add_stochastic_` for flat contiguous tensors."""
    size = (64 if INTERPRETED else ROWS) * BLOCK
    programs = triton.cdiv(len(accumulator), size)
    _launch(
        _add_stochastic_kernel,
        programs,
        accumulator,
        _bits(accumulator),
        gradient,
        len(accumulator),
        *keys,
        SIZE=size,
    )


def _bits(weight: torch.Tensor) -> torch.Tensor:
    return weight.view(torch.int16) if weight.dtype == torch.bfloat16 else weight


def _launch(kernel, programs: int, weight: torch.Tensor, *args, **constants) -> None:
    if programs == 0:
        return
    options = dict(num_warps=NUM_WARPS, enable_fp_fusion=False)
    if weight.is_cuda:
        with torch.cuda.device(weight.device):
            kernel[(programs,)](*args, **constants, **options)
    else:
        kernel[(programs,)](*args, **constants, **options)
