"""The ways to compute a layer that bench_layers.py compares, and passes with and without gradients.

A variant makes a `Way` to compute a `Part` of layer_parts.py. All ways of a part have the same
parameters, and map the same hidden states to the same; a pass runs one of them.
"""

import copy
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from types import MethodType
from typing import NamedTuple

import torch
from layer_parts import Part, set_attention
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AttentionInterface

from mr1_fast.model.attention import packed_attention
from mr1_fast.model.block_parts import text_block, vision_block
from mr1_fast.model.forward import text_layer, vision_layer
from mr1_fast.model.joined_weights import join_weights
from mr1_fast.model.recompute import run_layers
from mr1_fast.model.vision import BlockCall

COMPILED_NAME = "bench_layers_flash"
"""The name in transformers of packed attention that torch.compile leaves as it is."""


class Way(NamedTuple):
    """How a variant computes a part."""

    call: Callable[..., tuple[Tensor, ...]]
    """Maps hidden states to the next layer's, both in `pieces` tensors whose sum they are."""
    pieces: int = 1
    recomputed: Callable[..., tuple[Tensor, ...]] | None = None
    """The same, keeping only what `call` is given; None: by torch's checkpoint."""


def transformers(part: Part) -> Way:
    """The layer's own modules, operator by operator."""
    return Way(lambda x: (part.call(part.layer, x),))


def ours(part: Part) -> Way:
    """Our fused operators, with the backward passes of mr1_fast/model/blocks.py.

    Raises NotImplementedError for a layer that they do not take apart.
    """
    is_text = part.segments is not None
    join_weights([part.layer])
    if (text_block if is_text else vision_block)(part.layer) is None:
        raise NotImplementedError("a linear layer of a kind that blocks.py does not know")
    angles = tuple(each.flatten(0, -2) for each in part.angles)
    told = dict(cu_seqlens=part.bounds, max_seqlen=part.longest, position_embeddings=angles)

    def run(residual: Tensor, update: Tensor, recomputed: int) -> tuple[Tensor, ...]:
        # Taken apart anew, as in every forward pass.
        if is_text:
            layer = text_layer(part.layer, angles, part.segments)
        else:
            layer = vision_layer(BlockCall(part.layer, told))
        carry = residual.flatten(0, -2), update.flatten(0, -2)
        return tuple(x.view_as(residual) for x in run_layers([layer], carry, recomputed))

    return Way(partial(run, recomputed=0), pieces=2, recomputed=partial(run, recomputed=1))


def liger(part: Part) -> Way:
    """The same layer with Liger's norms, SwiGLU and rotation of queries and keys.

    Liger itself replaces `apply_multimodal_rotary_pos_emb`, which transformers 5 no longer has: its
    angles are those of all three axes already, so that Liger's plain rotation is exact.
    """
    from liger_kernel.ops import LigerLayerNormFunction, LigerRMSNormFunction, LigerRopeFunction
    from liger_kernel.transformers import LigerSwiGLUMLP

    def rms_norm(self, x: Tensor) -> Tensor:
        return LigerRMSNormFunction.apply(x, self.weight, self.variance_epsilon)

    def layer_norm(self, x: Tensor) -> Tensor:
        return LigerLayerNormFunction.apply(x, self.weight, self.bias, self.eps)

    def rotate_patches(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
        heads_first = (x.transpose(0, 1)[None] for x in (q, k))
        q, k = LigerRopeFunction.apply(*heads_first, cos, sin)
        return q[0].transpose(0, 1), k[0].transpose(0, 1)

    layer = _like(part.layer)
    for module in layer.modules():
        if type(module).__name__.endswith("RMSNorm"):
            module.forward = MethodType(rms_norm, module)
        elif isinstance(module, nn.LayerNorm):
            module.forward = MethodType(layer_norm, module)
        elif hasattr(module, "gate_proj"):
            module.forward = MethodType(LigerSwiGLUMLP.forward, module)
    modeling = importlib.import_module(type(part.layer).__module__)
    rotations = dict(
        apply_rotary_pos_emb=LigerRopeFunction.apply,
        apply_rotary_pos_emb_vision=rotate_patches,
    )

    def call(x: Tensor) -> tuple[Tensor]:
        with _replaced(modeling, rotations):
            return (part.call(layer, x),)

    return Way(call)


def compiled(part: Part) -> Way:
    """torch.compile of the layer, for any number of tokens; attention is left as it is.

    A CPU only tries the script out: the layer is traced, but no C++ is compiled.
    """
    if part.x.is_meta:
        raise NotImplementedError("Inductor fuses for a device that is there")
    layer = _like(part.layer)
    set_attention(layer, COMPILED_NAME)
    backend = "inductor" if part.x.is_cuda else "aot_eager"
    run = torch.compile(layer, dynamic=True, backend=backend)
    return Way(lambda x: (part.call(run, x),))


AttentionInterface.register(COMPILED_NAME, torch.compiler.disable(packed_attention))

VARIANTS = {"transformers": transformers, "ours": ours, "liger": liger, "compiled": compiled}
"""Ways to compute a part, by name."""


def _like(layer: nn.Module) -> nn.Module:
    """A copy of a layer that has the same parameters."""
    return copy.deepcopy(layer, {id(p): p for p in layer.parameters()})


@contextmanager
def _replaced(module, functions: dict[str, Callable]) -> Iterator[None]:
    """Give global names of a module other values inside."""
    before = {name: getattr(module, name) for name in functions}
    vars(module).update(functions)
    try:
        yield
    finally:
        vars(module).update(before)


# --- passes ---------------------------------------------------------------------------------------

FORWARD, STORED, RECOMPUTED = "forward", "with backward", "with recomputation and backward"
ADDED = "the same, gradients added"
PASSES = (FORWARD, STORED, RECOMPUTED, ADDED)
"""Passes over a layer: without gradients; with what the backward pass needs stored; with the layer
run again in the backward pass; and the same for a step's later packs, whose gradients are added to
those that are there."""


def pieces(way: Way, x: Tensor) -> tuple[Tensor, ...]:
    """Hidden states as what `way.call` takes: x, and zeros for every further tensor."""
    inputs = (x, *(torch.zeros_like(x) for _ in range(way.pieces - 1)))
    return tuple(each.detach().requires_grad_() for each in inputs)


def run_pass(
    name: str, way: Way, inputs: tuple[Tensor, ...], gradient: Tensor
) -> tuple[tuple[Tensor, ...], list[Tensor]]:
    """Run a pass on `pieces`, with the gradient of the hidden states after the layer.

    Returns these hidden states, in pieces, and the gradients of the inputs, of which a forward pass
    has none. Those of the parameters are in their `grad`.
    """
    if name == FORWARD:
        with torch.no_grad():
            return way.call(*inputs), []
    received: list[Tensor] = []
    entered = [_Entry.apply(each, received) for each in inputs]
    recomputed = way.recomputed or partial(checkpoint, way.call, use_reentrant=False)
    outputs = (way.call if name == STORED else recomputed)(*entered)
    torch.autograd.backward(outputs, [gradient] * len(outputs))
    return outputs, received


class _Entry(torch.autograd.Function):
    """Where a layer's gradient leaves it: autograd adds nothing up behind it."""

    @staticmethod
    def forward(ctx, x: Tensor, received: list[Tensor]) -> Tensor:
        ctx.received = received
        return x.view_as(x)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[None, None]:
        ctx.received.append(gradient)
        return None, None
