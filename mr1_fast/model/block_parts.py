"""The parts of a transformer layer: its norms, linear layers and activation.

Text layers and vision blocks are taken apart alike. The modules are transformers', and so are their
weights: nothing here holds any.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from transformers.activations import GELUTanh, QuickGELUActivation

from ..kernels.layers.head_norms import HeadNorms
from .adapters import Adapters
from .linears import Linears


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


def head_norms(attention: nn.Module) -> HeadNorms | None:
    """Read the norms of queries' and keys' heads in a text layer's attention, if it has them."""
    if not hasattr(attention, "q_norm"):
        return None
    q, k = Norm.of(attention.q_norm), Norm.of(attention.k_norm)
    return HeadNorms(q.weight, k.weight, q.eps)


Activation = Literal["silu_mul", "quick", "tanh"]
"""What an MLP computes between its products: silu(gate) · up, or a kind of GELU (`fused.gelu`)."""


@dataclass
class Block:
    """The parts of a layer, and what its attention is told."""

    attention: nn.Module
    """The attention module, for its scale and the name of its attention function."""
    norm1: Norm
    qkv: Linears
    heads: int
    kv_heads: int
    head_norms: HeadNorms | None
    out: Linears
    norm2: Norm
    up: Linears
    """A gate and an up for the activation "silu_mul", else one layer."""
    activation: Activation
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
    if not _is_silu(mlp.act_fn) or not _takes_heads(layer):
        return None
    return _block(
        attention,
        (layer.input_layernorm, layer.post_attention_layernorm),
        (attention.q_proj, attention.k_proj, attention.v_proj),
        attention.config.num_attention_heads,
        attention.config.num_key_value_heads,
        attention.o_proj,
        (mlp.gate_proj, mlp.up_proj),
        "silu_mul",
        mlp.down_proj,
    )


def _takes_heads(layer: nn.Module) -> bool:
    """Tell whether a text layer's heads have no norms, or two that are alike.

    Those are of all channels of a head, and have the dtype of the layer.
    """
    attention = layer.self_attn
    if not hasattr(attention, "q_norm"):
        return True
    q, k = Norm.of(attention.q_norm), Norm.of(attention.k_norm)
    dtype = layer.input_layernorm.weight.dtype
    return q.eps == k.eps and all(
        norm.weight.shape == (attention.head_dim,) and norm.weight.dtype == dtype for norm in (q, k)
    )


def vision_block(layer: nn.Module) -> Block | None:
    """Take a vision block apart; None if one of its parts is not known here."""
    attention, mlp = layer.attn, layer.mlp
    if hasattr(mlp, "gate_proj"):
        activation = "silu_mul" if _is_silu(mlp.act_fn) else None
        up, down = (mlp.gate_proj, mlp.up_proj), mlp.down_proj
    elif hasattr(mlp, "linear_fc1"):
        activation = _gelu_kind(mlp.act_fn)
        up, down = (mlp.linear_fc1,), mlp.linear_fc2
    else:
        activation = _gelu_kind(mlp.act)
        up, down = (mlp.fc1,), mlp.fc2
    if activation is None:
        return None
    heads = attention.num_heads
    norms = layer.norm1, layer.norm2
    return _block(
        attention, norms, (attention.qkv,), heads, heads, attention.proj, up, activation, down
    )


def _block(
    attention: nn.Module,
    norms: tuple[nn.Module, nn.Module],
    qkv: tuple[nn.Module, ...],
    heads: int,
    kv_heads: int,
    out: nn.Module,
    up: tuple[nn.Module, ...],
    activation: Activation,
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
        head_norms=head_norms(attention),
        out=out_linears,
        norm2=norm2,
        up=up_linears,
        activation=activation,
        down=down_linears,
    )


def _is_silu(activation: nn.Module | Callable) -> bool:
    return "silu" in type(activation).__name__.lower()


def _gelu_kind(activation: nn.Module) -> Literal["quick", "tanh"] | None:
    kinds = {QuickGELUActivation: "quick", GELUTanh: "tanh"}
    return next((kind for known, kind in kinds.items() if isinstance(activation, known)), None)
