"""The operators of `torch.ops.mr1_fast` on the rows of a layer, and their gradients.

Each is one dispatched operation, on meta tensors, too, so that a plan of memory use or a compiler
sees one node. A layer has four in each pass, so they are registered without
`torch.library.custom_op`, whose wrappers take three times as long per call. Gradients are autograd
Functions, which are entered only where a gradient is needed: the operators themselves have none,
and the backward ones are called where gradients are off, as in a backward.
"""

from collections.abc import Callable

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from ..dispatch import statistics_dtype
from . import operations
from .strides import adjacent

_LIBRARY = torch.library.Library("mr1_fast", "FRAGMENT")


def _operator(operation: Callable, fake: Callable) -> torch._ops.OpOverload:
    """Register an operation by its name and annotations; `fake` allocates its results."""
    name = operation.__name__
    schema = torch.library.infer_schema(operation, mutates_args=())
    _LIBRARY.define(name + schema, tags=(torch.Tag.pt2_compliant_tag,))
    _LIBRARY.impl(name, operation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"mr1_fast::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.mr1_fast, name).default


def _differentiable(*inputs: Tensor | None) -> bool:
    """Tell whether a gradient by one of the inputs may be asked for."""
    return torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in inputs)


# --- norms --------------------------------------------------------------------------------------


def _fake_norm(x, weight, bias, eps):
    return x.new_empty(x.shape)


def _fake_add_norm(x, update, weight, bias, eps):
    return x.new_empty(x.shape), x.new_empty(x.shape)


def _fake_norm_backward(
    dnormed, dresidual, x, weight, bias, eps, with_normed, with_weights
) -> tuple[Tensor, Tensor, Tensor]:
    sums = operations.sum_parts(x), 1 if bias is None else 2, x.shape[1]
    return (
        x.new_empty(x.shape),
        x.new_empty(x.shape if with_normed else 0),
        x.new_empty(sums if with_weights else 0, dtype=statistics_dtype(x)),
    )


def _fake_norm_gradients(partial, weight):
    return weight.new_empty(partial.shape[1:])


_norm = _operator(operations.norm, _fake_norm)
_add_norm = _operator(operations.add_norm, _fake_add_norm)
norm_backward = _operator(operations.norm_backward, _fake_norm_backward)
"""`operations.norm_backward` as an operator."""
norm_gradients = _operator(operations.norm_gradients, _fake_norm_gradients)
"""`operations.norm_gradients` as an operator."""


def _row_and_weight_gradients(
    ctx, dnormed: Tensor, dresidual: Tensor | None
) -> tuple[Tensor | None, ...]:
    """Return dx, dweight and dbias; the last two are None where nobody needs them."""
    x, weight, bias = ctx.saved_tensors
    needs = ctx.needs_input_grad[-3:-1]
    dx, _, partial = norm_backward(
        adjacent(dnormed), dresidual, x, weight, bias, ctx.eps, False, any(needs)
    )
    if not any(needs):
        return dx, None, None
    sums = norm_gradients(partial, weight)
    return dx, *(sums[i] if need else None for i, need in enumerate(needs))


class _Norm(torch.autograd.Function):
    """`operations.norm` with its gradients by x, weight and bias."""

    @staticmethod
    def forward(ctx, x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
        ctx.save_for_backward(x, weight, bias)
        ctx.eps = eps
        return _norm(x, weight, bias, eps)

    @staticmethod
    @once_differentiable
    def backward(ctx, dnormed: Tensor):
        return *_row_and_weight_gradients(ctx, dnormed, None), None


class _AddNorm(torch.autograd.Function):
    """`operations.add_norm` with its gradients; x and update have the same one."""

    @staticmethod
    def forward(
        ctx, x: Tensor, update: Tensor, weight: Tensor, bias: Tensor | None, eps: float
    ) -> tuple[Tensor, Tensor]:
        residual, normed = _add_norm(x, update, weight, bias, eps)
        ctx.save_for_backward(residual, weight, bias)
        ctx.eps = eps
        return residual, normed

    @staticmethod
    @once_differentiable
    def backward(ctx, dresidual: Tensor, dnormed: Tensor):
        dx, *by_weights = _row_and_weight_gradients(ctx, dnormed, adjacent(dresidual))
        return dx, dx, *by_weights, None


def norm(x: Tensor, weight: Tensor, bias: Tensor | None, eps: float) -> Tensor:
    """Compute `operations.norm`, differentiable by x, weight and bias."""
    apply = _Norm.apply if _differentiable(x, weight, bias) else _norm
    return apply(x, weight, bias, eps)


def add_norm(
    x: Tensor, update: Tensor, weight: Tensor, bias: Tensor | None, eps: float
) -> tuple[Tensor, Tensor]:
    """Compute `operations.add_norm`, differentiable by all tensors."""
    apply = _AddNorm.apply if _differentiable(x, update, weight, bias) else _add_norm
    return apply(x, update, weight, bias, eps)


# --- the rotary embedding -----------------------------------------------------------------------


def _fake_rotary(qkv, bias, cos, sin, heads, kv_heads):
    tokens, d = cos.shape
    return tuple(qkv.new_empty(tokens, count, d) for count in (heads, kv_heads, kv_heads))


def _fake_rotary_backward(dq, dk, dv, cos, sin):
    tokens, heads, d = dq.shape
    return dq.new_empty(tokens, (heads + 2 * dk.shape[1]) * d)


_rotary = _operator(operations.rotary, _fake_rotary)
rotary_backward = _operator(operations.rotary_backward, _fake_rotary_backward)
"""`operations.rotary_backward` as an operator."""


class _Rotary(torch.autograd.Function):
    """`operations.rotary` with its gradients by qkv and bias."""

    @staticmethod
    def forward(
        ctx,
        qkv: Tensor,
        bias: Tensor | None,
        cos: Tensor,
        sin: Tensor,
        heads: int,
        kv_heads: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(cos, sin)
        return _rotary(qkv, bias, cos, sin, heads, kv_heads)

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor):
        dqkv = rotary_backward(*map(adjacent, gradients), *ctx.saved_tensors)
        dbias = dqkv.sum(0) if ctx.needs_input_grad[1] else None
        return dqkv, dbias, None, None, None, None


def rotary(
    qkv: Tensor, bias: Tensor | None, cos: Tensor, sin: Tensor, heads: int, kv_heads: int
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `operations.rotary`, differentiable by qkv and bias."""
    apply = _Rotary.apply if _differentiable(qkv, bias) else _rotary
    return apply(qkv, bias, cos, sin, heads, kv_heads)


# --- gating -------------------------------------------------------------------------------------


def _fake_silu_mul(gate_up, bias):
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


def _fake_silu_mul_backward(dout, gate_up, bias):
    return gate_up.new_empty(gate_up.shape), gate_up.new_empty(dout.shape)


def _fake_quick_gelu(x):
    return x.new_empty(x.shape)


def _fake_quick_gelu_backward(dout, x):
    return x.new_empty(x.shape), x.new_empty(x.shape)


_silu_mul = _operator(operations.silu_mul, _fake_silu_mul)
silu_mul_backward = _operator(operations.silu_mul_backward, _fake_silu_mul_backward)
"""`operations.silu_mul_backward` as an operator."""
_quick_gelu = _operator(operations.quick_gelu, _fake_quick_gelu)
quick_gelu_backward = _operator(operations.quick_gelu_backward, _fake_quick_gelu_backward)
"""`operations.quick_gelu_backward` as an operator."""


class _SiluMul(torch.autograd.Function):
    """`operations.silu_mul` with its gradients by gate_up and bias."""

    @staticmethod
    def forward(ctx, gate_up: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(gate_up, bias)
        return _silu_mul(gate_up, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor):
        dgate_up, _ = silu_mul_backward(adjacent(dout), *ctx.saved_tensors)
        return dgate_up, dgate_up.sum(0) if ctx.needs_input_grad[1] else None


class _QuickGelu(torch.autograd.Function):
    """`operations.quick_gelu` with its gradient."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return _quick_gelu(x)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor):
        return quick_gelu_backward(adjacent(dout), *ctx.saved_tensors)[0]


def silu_mul(gate_up: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `operations.silu_mul`, differentiable by gate_up and bias."""
    apply = _SiluMul.apply if _differentiable(gate_up, bias) else _silu_mul
    return apply(gate_up, bias)


def quick_gelu(x: Tensor) -> Tensor:
    """Compute `operations.quick_gelu`, differentiable."""
    return (_QuickGelu.apply if _differentiable(x) else _quick_gelu)(x)
