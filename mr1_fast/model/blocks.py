"""Transformer layers computed by fused operators: text layers and vision blocks alike.

A layer is pre-norm: h ← h + attention(norm₁(h)), h ← h + mlp(norm₂(h)). The hidden state travels as
(residual, update), whose sum it is: the next norm adds the two while it reads them, so that no
kernel adds alone. Two functions with backward passes of their own surround attention:

    attention_inputs   h = residual + update; q, k, v = rotary(linear(norm₁(h)))
    after_attention    h = h + linear(attended); update = linear(act(linear(norm₂(h))))

They keep the results of matrix products that their gradients need, and h; norms and gating are
computed again by the kernels of their own gradients, which read their inputs anyway.

The modules are transformers', and so are their weights: nothing here holds any.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.autograd import Function
from transformers.activations import QuickGELUActivation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from ..kernels.layers import operators as fused
from ..kernels.layers.strides import adjacent
from .adapters import Adapters, cast_adapters, forget_casts
from .linears import NOTHING, Kept, Linears


@dataclass
class Norm:
    """An RMSNorm, or a LayerNorm where it has a bias."""

    weight: Tensor
    bias: Tensor | None
    eps: float

    @classmethod
    def of(cls, module: nn.Module) -> Norm:
        """Read a LayerNorm of torch, or an RMSNorm of transformers."""
        if isinstance(module, nn.LayerNorm):
            return cls(module.weight, module.bias, module.eps)
        return cls(module.weight, None, module.variance_epsilon)


@dataclass
class Block:
    """The parts of a layer, and what its attention is told."""

    attention: nn.Module
    """The attention module, for its scale and the name of its attention function."""
    norm1: Norm
    qkv: Linears
    heads: int
    kv_heads: int
    out: Linears
    norm2: Norm
    up: Linears
    is_gated: bool
    """Whether `up` is a gate and an up, for silu(gate) · up, or a layer before a quick GELU."""
    down: Linears

    @property
    def linears(self) -> tuple[Linears, ...]:
        """All linear layers, in the order of their use."""
        return self.qkv, self.out, self.up, self.down

    @property
    def adapters(self) -> list[Adapters | None]:
        """The adapters of all linear layers."""
        return [linears.adapters for linears in self.linears]


def text_block(layer: nn.Module) -> Block | None:
    """Take a text layer apart; None if one of its parts is not known here."""
    attention, mlp = layer.self_attn, layer.mlp
    if not _is_silu(mlp.act_fn) or hasattr(attention, "q_norm"):
        return None
    return _block(
        attention,
        (layer.input_layernorm, layer.post_attention_layernorm),
        (attention.q_proj, attention.k_proj, attention.v_proj),
        attention.config.num_attention_heads,
        attention.config.num_key_value_heads,
        attention.o_proj,
        (mlp.gate_proj, mlp.up_proj),
        mlp.down_proj,
    )


def vision_block(layer: nn.Module) -> Block | None:
    """Take a vision block apart; None if one of its parts is not known here."""
    attention, mlp = layer.attn, layer.mlp
    if hasattr(mlp, "gate_proj"):
        is_known, up, down = _is_silu(mlp.act_fn), (mlp.gate_proj, mlp.up_proj), mlp.down_proj
    else:
        activation = getattr(mlp, "act", None)
        if not isinstance(activation, QuickGELUActivation):
            return None
        is_known, up, down = True, (mlp.fc1,), mlp.fc2
    if not is_known:
        return None
    heads = attention.num_heads
    norms = layer.norm1, layer.norm2
    return _block(attention, norms, (attention.qkv,), heads, heads, attention.proj, up, down)


def _block(
    attention: nn.Module,
    norms: tuple[nn.Module, nn.Module],
    qkv: tuple[nn.Module, ...],
    heads: int,
    kv_heads: int,
    out: nn.Module,
    up: tuple[nn.Module, ...],
    down: nn.Module,
) -> Block | None:
    """Put a block together from modules; None if a linear layer is not known here.

    Linear layers must compute in the dtype of the norms.
    """
    norm1, norm2 = map(Norm.of, norms)
    linears = [Linears.of(*modules) for modules in (qkv, (out,), up, (down,))]
    if any(each is None or each.dtype != norm1.weight.dtype for each in linears):
        return None
    qkv_linears, out_linears, up_linears, down_linears = linears
    return Block(
        attention=attention,
        norm1=norm1,
        qkv=qkv_linears,
        heads=heads,
        kv_heads=kv_heads,
        out=out_linears,
        norm2=norm2,
        up=up_linears,
        is_gated=len(up) == 2,
        down=down_linears,
    )


def _is_silu(activation: nn.Module | Callable) -> bool:
    return "silu" in type(activation).__name__.lower()


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
    h, q, k, v = _AttentionInputs.apply(
        block, recomputed, residual, update, *angles, block.norm1.weight, block.norm1.bias,
        block.qkv.bias, *block.qkv.tensors,
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
        q, k, v = fused.rotary(qkv, linears.bias_to_add, cos, sin, block.heads, block.kv_heads)
        ctx.block = block
        ctx.save_for_backward(h, cos, sin, *kept, *linears.tensors)
        return h, q, k, v

    @staticmethod
    def backward(ctx, dh, dq, dk, dv):
        h, cos, sin, *saved = ctx.saved_tensors
        norm, linears, kept = ctx.block.norm1, ctx.block.qkv, next(Kept.among(saved))
        _, _, for_residual, for_update, _, _, *needs = ctx.needs_input_grad
        needs_norm, _, needs_bias, *needs_linears = needs
        dqkv = fused.rotary_backward(*map(adjacent, (dq, dk, dv)), cos, sin)
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


def _activated(block: Block, up: Tensor) -> Tensor:
    """Apply the MLP's activation to (T, 2F) or (T, F): returns (T, F)."""
    return fused.silu_mul(up, block.up.bias_to_add) if block.is_gated else fused.quick_gelu(up)


def _activation_gradient(block: Block, gradient: Tensor, up: Tensor) -> tuple[Tensor, Tensor]:
    """Return the gradient of `up`, and the activation's result once more."""
    if block.is_gated:
        return fused.silu_mul_backward(gradient, up, block.up.bias_to_add)
    return fused.quick_gelu_backward(gradient, up)


def _norm_gradients(norm: Norm, partial: Tensor) -> tuple[Tensor | None, Tensor | None]:
    """Add up the parts of the gradients of a norm's weight and bias."""
    if not len(partial):
        return None, None
    total = fused.norm_gradients(partial, norm.weight)
    return total[0], None if norm.bias is None else total[1]
