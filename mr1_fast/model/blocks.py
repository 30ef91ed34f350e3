"""Transformer layers computed by fused operators: text layers and vision blocks alike.

A layer is pre-norm: h ← h + attention(norm₁(h)), h ← h + mlp(norm₂(h)). The hidden state travels as
(residual, update), whose sum it is: the next norm adds the two while it reads them, so that no
kernel adds alone. Two functions with backward passes of their own surround attention:

    attention_inputs   h = residual + update; q, k, v = rotary(linear(norm₁(h))), with a norm of
                       each head of q and k before the rotation where the model has them
    after_attention    h = h + linear(attended); update = linear(act(linear(norm₂(h))))

They keep the results of matrix products that their gradients need, and h; norms and gating are
computed again by the kernels of their own gradients, which read their inputs anyway.

block_parts.py takes the modules of transformers apart.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import torch
from torch import Tensor
from torch.autograd import Function
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..kernels.layers import operators as fused
from ..kernels.layers.head_norms import HeadNorms
from ..kernels.layers.strides import adjacent
from .adapters import cast_adapters, forget_casts
from .block_parts import Block, Norm
from .linears import NOTHING, Kept


def run_block(
    block: Block,
    residual: Tensor,
    update: Tensor | None,
    angles: tuple[Tensor, Tensor],
    remember: Callable[[Tensor], None] | None = None,
    again: bool = False,
    cache: object | None = None,
    **attention_arguments,
) -> tuple[Tensor, Tensor]:
    """Compute a layer: (residual, update), (T, D) each, to those of the next layer.

    angles: cosines and sines, (T, d) each.
    remember: is handed the hidden state h (T, D), from which the layer can be computed again.
    again: whether it is, for its gradient: then the update is not computed, since no gradient
    needs it.
    cache: keeps keys and values, like a cache of transformers.
    attention_arguments: what the attention function is told of the packed tokens.
    """
    cast_adapters(block.adapters)
    recomputed = again or remember is not None
    head_weights = block.head_norms.weights if block.head_norms else (None, None)
    h, q, k, v = _AttentionInputs.apply(
        block, recomputed, residual, update, *angles, block.norm1.weight, block.norm1.bias,
        *head_weights, block.qkv.bias, *block.qkv.tensors,
    )  # fmt: skip
    if remember is not None:
        remember(h)
    # As transformers' attention functions take them: (1, heads, T, d)
    q, k, v = (x.transpose(0, 1)[None] for x in (q, k, v))
    attention = block.attention
    if cache is not None:
        k, v = cache.update(k, v, attention.layer_idx)
    attend = ALL_ATTENTION_FUNCTIONS[attention.config._attn_implementation]
    attended, _ = attend(attention, q, k, v, None, scaling=attention.scaling, **attention_arguments)
    carry = _AfterAttention.apply(
        block, again, recomputed, h, attended.flatten(0, 1).flatten(1),
        block.norm2.weight, block.norm2.bias, block.out.bias, block.up.bias, block.down.bias,
        *block.out.tensors, *block.up.tensors, *block.down.tensors,
    )  # fmt: skip
    if remember is not None or not torch.is_grad_enabled():
        forget_casts(block.adapters)  # no gradient follows, or not before the second run
    return carry


class _AttentionInputs(Function):
    """The sum, its norm, and the rotated queries and keys with the values, (T, heads, d) each."""

    @staticmethod
    def forward(ctx, block, recomputed, residual, update, cos, sin, *parameters):
        norm, linears = block.norm1, block.qkv
        if update is None:
            h, x = residual, fused.norm(residual, norm.weight, norm.bias, norm.eps)
        else:
            h, x = fused.add_norm(residual, update, norm.weight, norm.bias, norm.eps)
        qkv, kept = linears.product(x, recomputed)
        bias, counts = linears.bias_to_add, (block.heads, block.kv_heads)
        if block.head_norms is None:
            q, k, v = fused.rotary(qkv, bias, cos, sin, *counts)
            qkv = None
        else:
            qkv = qkv if bias is None else qkv.add_(bias)
            norms = block.head_norms
            q, k, v = fused.norm_rotary(qkv, *norms.weights, norms.eps, cos, sin, *counts)
        ctx.block = block
        ctx.save_for_backward(h, cos, sin, qkv, *kept, *linears.tensors)
        return h, q, k, v

    @staticmethod
    def backward(ctx, dh, dq, dk, dv):
        h, cos, sin, qkv, *saved = ctx.saved_tensors
        norm, linears, kept = ctx.block.norm1, ctx.block.qkv, next(Kept.among(saved))
        _, _, for_residual, for_update, _, _, *needs = ctx.needs_input_grad
        needs_norm, _, *needs_heads, needs_bias = needs[:5]
        needs_linears = needs[5:]
        dqkv, by_heads = _rotary_gradient(
            ctx.block.head_norms, map(adjacent, (dq, dk, dv)), qkv, cos, sin, needs_heads
        )
        dx, dt = linears.input_gradient(dqkv, kept)
        dh, x, partial = fused.norm_backward(
            dx, adjacent(dh), h, norm.weight, norm.bias, norm.eps, any(needs_linears), needs_norm
        )
        gradients = linears.gradients(dqkv, x, needs_linears, kept, dt)
        forget_casts(ctx.block.adapters)
        return (
            None,
            None,
            dh if for_residual else None,
            dh if for_update else None,
            None,
            None,
            *_norm_gradients(norm, partial),
            *by_heads,
            dqkv.sum(0) if needs_bias else None,
            *gradients,
        )


class _AfterAttention(Function):
    """The output projection, the sum, its norm, and the MLP, whose result is the new update."""

    @staticmethod
    def forward(ctx, block, again, recomputed, h, attended, *parameters):
        norm = block.norm2
        projected, kept_out = block.out.product(attended, recomputed)
        h, x = fused.add_norm(h, projected, norm.weight, norm.bias, norm.eps)
        up, kept_up = block.up.product(x, recomputed)
        del projected, x  # the MLP's results need the room
        if again:
            update, kept_down = torch.empty_like(h), NOTHING
        else:
            update, kept_down = block.down.product(_activated(block, up))
        if recomputed:
            kept_down = NOTHING  # the second run, which computes no update, must save as much
        ctx.block = block
        linears = block.out, block.up, block.down
        tensors = (tensor for each in linears for tensor in each.tensors)
        ctx.save_for_backward(attended, h, up, *kept_out, *kept_up, *kept_down, *tensors)
        return h, update

    @staticmethod
    def backward(ctx, dh, dupdate):
        block, norm = ctx.block, ctx.block.norm2
        attended, h, up, *saved = ctx.saved_tensors
        kept_out, kept_up, kept_down, *_ = Kept.among(saved)
        _, _, _, needs_h, needs_attended, *needs = ctx.needs_input_grad
        needs_norm, _, *needs_biases = needs[:5]
        rest = iter(needs[5:])
        needs_out, needs_up, needs_down = (
            [next(rest) for _ in linears.tensors] for linears in (block.out, block.up, block.down)
        )

        dactivated, dt = block.down.input_gradient(dupdate, kept_down)
        dup, activated = _activation_gradient(block, dactivated, up)
        down = block.down.gradients(dupdate, activated, needs_down, kept_down, dt)
        del dactivated, activated
        dx, dt_up = block.up.input_gradient(dup, kept_up)
        dh, x, partial = fused.norm_backward(
            dx, adjacent(dh), h, norm.weight, norm.bias, norm.eps, any(needs_up), needs_norm
        )
        biases = [
            dy.sum(0) if needed else None
            for dy, needed in zip((dh, dup, dupdate), needs_biases, strict=True)
        ]
        dattended, dt_out = (
            block.out.input_gradient(dh, kept_out) if needs_attended else (None, None)
        )
        return (
            None,
            None,
            None,
            dh if needs_h else None,
            dattended,
            *_norm_gradients(norm, partial),
            *biases,
            *block.out.gradients(dh, attended, needs_out, kept_out, dt_out),
            *block.up.gradients(dup, x, needs_up, kept_up, dt_up),
            *down,
        )


def _rotary_gradient(
    norms: HeadNorms | None,
    gradients: Iterable[Tensor],
    qkv: Tensor | None,
    cos: Tensor,
    sin: Tensor,
    needed: Sequence[bool],
) -> tuple[Tensor, Sequence[Tensor | None]]:
    """Return the gradient by qkv, and those by the weights of the heads' norms."""
    if norms is None:
        return fused.rotary_backward(*gradients, cos, sin), (None, None)
    dqkv, partial = fused.norm_rotary_backward(
        *gradients, qkv, *norms.weights, norms.eps, cos, sin, any(needed)
    )
    return dqkv, fused.head_norm_gradients(partial, norms.q, needed)


def _activated(block: Block, up: Tensor) -> Tensor:
    """Apply the MLP's activation to (T, 2F) or (T, F): returns (T, F)."""
    if block.activation == "silu_mul":
        return fused.silu_mul(up, block.up.bias_to_add)
    return fused.gelu(up, block.activation)


def _activation_gradient(block: Block, gradient: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of `up`, and the activation's result once more."""
    if block.activation == "silu_mul":
        return fused.silu_mul_backward(gradient, up, block.up.bias_to_add)
    return fused.gelu_backward(gradient, up, block.activation)


def _norm_gradients(norm: Norm, partial: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Add up the parts of the gradients of a norm's weight and bias."""
    if not len(partial):
        return None, None
    total = fused.norm_gradients(partial, norm.weight)
    return total[0], None if norm.bias is None else total[1]
