"""The operators of `torch.ops.mr1_fast` on the rows of a layer, and their gradients.

Each is one dispatched operation, on meta tensors, too, so that a plan of memory use or a compiler
sees one node. A layer has four in each pass, so they are registered without
`torch.library.custom_op`, whose wrappers take three times as long per call. Gradients are autograd
Functions, which are entered only where a gradient is needed: the operators themselves have none,
and the backward ones are called where gradients are off, as in a backward.
"""

from collections.abc import Callable, Sequence

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


# --- the rotary embedding of normed heads -------------------------------------------------------


def _fake_norm_rotary(qkv, q_weight, k_weight, eps, cos, sin, heads, kv_heads):
    tokens, d = cos.shape
    return tuple(qkv.new_empty(tokens, count, d) for count in (heads, kv_heads))


def _fake_norm_rotary_backward(
    dq, dk, dv, qkv, q_weight, k_weight, eps, cos, sin, with_weights
) -> tuple[Tensor, Tensor]:
    sums = operations.head_sum_parts(qkv), 2, cos.shape[1]
    return (
        qkv.new_empty(qkv.shape),
        qkv.new_empty(sums if with_weights else 0, dtype=statistics_dtype(qkv)),
    )


_norm_rotary = _operator(operations.norm_rotary, _fake_norm_rotary)
norm_rotary_backward = _operator(operations.norm_rotary_backward, _fake_norm_rotary_backward)
"""`operations.norm_rotary_backward` as an operator."""


class _NormRotary(torch.autograd.Function):
    """`operations.norm_rotary` and the values, with the gradients by qkv and the weights."""

    @staticmethod
    def forward(
        ctx,
        qkv: Tensor,
        q_weight: Tensor,
        k_weight: Tensor,
        eps: float,
        cos: Tensor,
        sin: Tensor,
        heads: int,
        kv_heads: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        ctx.save_for_backward(qkv, q_weight, k_weight, cos, sin)
        ctx.eps = eps
        q, k = _norm_rotary(qkv, q_weight, k_weight, eps, cos, sin, heads, kv_heads)
        return q, k, _values(qkv, kv_heads, cos.shape[1]).clone()

    @staticmethod
    @once_differentiable
    def backward(ctx, *gradients: Tensor):
        qkv, q_weight, k_weight, cos, sin = ctx.saved_tensors
        needs = ctx.needs_input_grad[1:3]
        dqkv, partial = norm_rotary_backward(
            *map(adjacent, gradients), qkv, q_weight, k_weight, ctx.eps, cos, sin, any(needs)
        )
        by_weights = head_norm_gradients(partial, q_weight, needs)
        return dqkv, *by_weights, *[None] * 5


def norm_rotary(
    qkv: Tensor,
    q_weight: Tensor,
    k_weight: Tensor,
    eps: float,
    cos: Tensor,
    sin: Tensor,
    heads: int,
    kv_heads: int,
) -> tuple[Tensor, Tensor, Tensor]:
    """Compute `operations.norm_rotary`, differentiable by qkv and the weights, and the values.

    These, (T, K, d), are a view of qkv; where a gradient may be asked for, a copy.
    """
    inputs = qkv, q_weight, k_weight, eps, cos, sin, heads, kv_heads
    if _differentiable(qkv, q_weight, k_weight):
        return _NormRotary.apply(*inputs)
    return *_norm_rotary(*inputs), _values(qkv, kv_heads, cos.shape[1])


def _values(qkv: Tensor, kv_heads: int, d: int) -> Tensor:
    return qkv[:, -kv_heads * d :].unflatten(1, (kv_heads, d))


def head_norm_gradients(
    partial: Tensor, weight: Tensor, needed: Sequence[bool]
) -> list[Tensor | None]:
    """Return the gradients by the norms' weights from `norm_rotary_backward`, where needed."""
    if not any(needed):
        return [None, None]
    sums = norm_gradients(partial, weight)
    return [sums[i] if need else None for i, need in enumerate(needed)]


# --- gating -------------------------------------------------------------------------------------


def _fake_silu_mul(gate_up, bias):
    return gate_up.new_empty(gate_up.shape[0], gate_up.shape[1] // 2)


def _fake_silu_mul_backward(dout, gate_up, bias):
    return gate_up.new_empty(gate_up.shape), gate_up.new_empty(dout.shape)


def _fake_gelu(x, kind):
    return x.new_empty(x.shape)


def _fake_gelu_backward(dout, x, kind):
    return x.new_empty(x.shape), x.new_empty(x.shape)


_silu_mul = _operator(operations.silu_mul, _fake_silu_mul)
silu_mul_backward = _operator(operations.silu_mul_backward, _fake_silu_mul_backward)
"""`operations.silu_mul_backward` as an operator."""
_gelu = _operator(operations.gelu, _fake_gelu)
gelu_backward = _operator(operations.gelu_backward, _fake_gelu_backward)
"""`operations.gelu_backward` as an operator."""


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


class _Gelu(torch.autograd.Function):
    """`operations.gelu` with its gradient."""

    @staticmethod
    def forward(ctx, x: Tensor, kind: str) -> Tensor:
        ctx.save_for_backward(x)
        ctx.kind = kind
        return _gelu(x, kind)

    @staticmethod
    @once_differentiable
    def backward(ctx, dout: Tensor):
        return gelu_backward(adjacent(dout), *ctx.saved_tensors, ctx.kind)[0], None


def silu_mul(gate_up: Tensor, bias: Tensor | None) -> Tensor:
    """Compute `operations.silu_mul`, differentiable by gate_up and bias."""
    apply = _SiluMul.apply if _differentiable(gate_up, bias) else _silu_mul
    return apply(gate_up, bias)


def gelu(x: Tensor, kind: str) -> Tensor:
    """Compute `operations.gelu`, differentiable."""
    return (_Gelu.apply if _differentiable(x) else _gelu)(x, kind)
