"""The gating of a layer's MLP and its activation in Triton, forward and backward.

A program computes BLOCK columns of a row. Everything is read once and written once: gating moves 3
numbers for each of its F columns forward (gate, up, output) and 6 backward (the output's gradient,
gate and up in; their gradients and the output out), the activation 2 and 4. The width and the
strides of rows are constants of a kernel: a model has one or two, and only so the compiler sees
that accesses may have 64 bits where a width is a multiple of 4 columns alone, as 3,420 is; of other
widths they have 128.
"""

import torch
import triton
import triton.language as tl

from ..launch import launch
from .reference import GELU_SLOPE, GELU_TANH
from .strides import require_adjacent

BLOCK = 1024
"""Columns of a program."""
WARPS = 2
"""Warps of a program: a thread has 16 columns, and 8 on AMD, so that accesses have 128 bits."""
_SLOPE = tl.constexpr(GELU_SLOPE)
_TWICE, _CUBIC = tl.constexpr(2 * GELU_TANH[0]), tl.constexpr(GELU_TANH[1])

# --- device functions ---------------------------------------------------------------------------


@triton.jit
def _block(F: tl.constexpr, BLOCK: tl.constexpr):
    """Return a program's row and columns, and which of these exist."""
    blocks: tl.constexpr = tl.cdiv(F, BLOCK)
    columns = (tl.program_id(0) % blocks) * BLOCK + tl.arange(0, BLOCK)
    return (tl.program_id(0) // blocks).to(tl.int64), columns, columns < F


@triton.jit
def _load_biased(X, BIAS, columns, mask):
    """Load columns, add the bias, and round as a linear layer does; the result is fp32."""
    x = tl.load(X + columns, mask=mask, other=0.0).to(tl.float32)
    if BIAS is not None:
        x += tl.load(BIAS + columns, mask=mask, other=0.0).to(tl.float32)
        x = x.to(X.dtype.element_ty).to(tl.float32)
    return x


@triton.jit
def _gelu_sigmoid(x, dtype: tl.constexpr, TANH: tl.constexpr):
    """Return the sigmoid that GELU multiplies x with, and x times the slope of its argument.

    (1 + tanh u)/2 is the sigmoid of 2u.
    """
    if TANH:
        twice, cubic = x * _TWICE, x * x * _CUBIC
        return tl.sigmoid(twice * (1 + cubic)), twice * (1 + 3 * cubic)
    scaled = (x * _SLOPE).to(dtype).to(tl.float32)
    return tl.sigmoid(scaled), scaled


@triton.jit
def _gelu(x, sigmoid, dtype: tl.constexpr, TANH: tl.constexpr):
    """Multiply the two; the quick GELU of transformers rounds the sigmoid before."""
    if not TANH:
        sigmoid = sigmoid.to(dtype).to(tl.float32)
    return (x * sigmoid).to(dtype)


# --- kernels ------------------------------------------------------------------------------------


@triton.jit
def _silu_mul_kernel(
    GATE_UP, BIAS, OUT, STRIDE: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr
):
    row, columns, mask = _block(F, BLOCK)
    dtype = OUT.dtype.element_ty
    gate_up = GATE_UP + row * STRIDE
    gate = _load_biased(gate_up, BIAS, columns, mask)
    up = _load_biased(gate_up, BIAS, F + columns, mask)
    out = (gate * tl.sigmoid(gate)).to(dtype).to(tl.float32) * up
    tl.store(OUT + row * F + columns, out.to(dtype), mask=mask)


@triton.jit
def _silu_mul_backward_kernel(
    DOUT, DOUT_STRIDE: tl.constexpr, GATE_UP, BIAS, DGATE_UP, OUT,
    STRIDE: tl.constexpr, F: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, columns, mask = _block(F, BLOCK)
    dtype = OUT.dtype.element_ty
    gate_up = GATE_UP + row * STRIDE
    gate = _load_biased(gate_up, BIAS, columns, mask)
    up = _load_biased(gate_up, BIAS, F + columns, mask)
    dout = tl.load(DOUT + row * DOUT_STRIDE + columns, mask=mask, other=0.0).to(tl.float32)
    sigmoid = tl.sigmoid(gate)
    activated = gate * sigmoid
    dgate = dout * up * (sigmoid + activated * (1 - sigmoid))
    dgate_up = DGATE_UP + row * (2 * F) + columns
    tl.store(dgate_up, dgate.to(dtype), mask=mask)
    tl.store(dgate_up + F, (dout * activated).to(dtype), mask=mask)
    out = activated.to(dtype).to(tl.float32) * up
    tl.store(OUT + row * F + columns, out.to(dtype), mask=mask)


@triton.jit
def _gelu_kernel(
    X, OUT, STRIDE: tl.constexpr, F: tl.constexpr, TANH: tl.constexpr, BLOCK: tl.constexpr
):
    row, columns, mask = _block(F, BLOCK)
    dtype = OUT.dtype.element_ty
    x = tl.load(X + row * STRIDE + columns, mask=mask, other=0.0).to(tl.float32)
    sigmoid, _ = _gelu_sigmoid(x, dtype, TANH)
    tl.store(OUT + row * F + columns, _gelu(x, sigmoid, dtype, TANH), mask=mask)


@triton.jit
def _gelu_backward_kernel(
    DOUT, DOUT_STRIDE: tl.constexpr, X, DX, OUT,
    STRIDE: tl.constexpr, F: tl.constexpr, TANH: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    row, columns, mask = _block(F, BLOCK)
    dtype = OUT.dtype.element_ty
    x = tl.load(X + row * STRIDE + columns, mask=mask, other=0.0).to(tl.float32)
    dout = tl.load(DOUT + row * DOUT_STRIDE + columns, mask=mask, other=0.0).to(tl.float32)
    sigmoid, slope = _gelu_sigmoid(x, dtype, TANH)
    dx = dout * (sigmoid + slope * sigmoid * (1 - sigmoid))
    tl.store(DX + row * F + columns, dx.to(dtype), mask=mask)
    tl.store(OUT + row * F + columns, _gelu(x, sigmoid, dtype, TANH), mask=mask)


# --- launchers ----------------------------------------------------------------------------------


def silu_mul(gate_up: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    """`operations.silu_mul`."""
    out = gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)
    _launch(_silu_mul_kernel, out, gate_up, bias, out, stride=gate_up.stride(0))
    return out


def silu_mul_backward(
    dout: torch.Tensor, gate_up: torch.Tensor, bias: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`operations.silu_mul_backward`."""
    dgate_up, out = gate_up.new_empty(gate_up.shape), gate_up.new_empty(dout.shape)
    arguments = dout, dout.stride(0), gate_up, bias, dgate_up, out
    _launch(_silu_mul_backward_kernel, out, *arguments, stride=gate_up.stride(0))
    return dgate_up, out


def gelu(x: torch.Tensor, kind: str) -> torch.Tensor:
    """`operations.gelu`."""
    out = x.new_empty(x.shape)
    _launch(_gelu_kernel, out, x, out, stride=x.stride(0), TANH=kind == "tanh")
    return out


def gelu_backward(
    dout: torch.Tensor, x: torch.Tensor, kind: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """`operations.gelu_backward`."""
    dx, out = x.new_empty(x.shape), x.new_empty(x.shape)
    arguments = dout, dout.stride(0), x, dx, out
    _launch(_gelu_backward_kernel, out, *arguments, stride=x.stride(0), TANH=kind == "tanh")
    return dx, out


def _launch(kernel, out: torch.Tensor, *arguments, stride: int, **options) -> None:
    """Run a kernel over the blocks of `out` (T, F)."""
    require_adjacent(*[each for each in arguments if isinstance(each, torch.Tensor)])
    rows, f = out.shape
    grid = (rows * triton.cdiv(f, BLOCK),)
    options |= dict(F=f, BLOCK=BLOCK, num_warps=WARPS)
    launch(kernel, grid, out.device, *arguments, stride, **options)
