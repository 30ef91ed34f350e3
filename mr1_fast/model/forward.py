"""The forward pass over packed tokens.

It computes no padding, encodes a prompt's images once for all of its completions, and returns
hidden states only for the rows that carry loss. Its loop over the layers is our own; a layer is
computed by fused operators (blocks.py), or by transformers' module.

Nothing here keeps state on the model. Positions are always passed in, so transformers'
`rope_deltas`, which `generate` leaves on the model, can never reach a training forward.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..kernels.layers.operators import add_norm
from ..segments import Segments
from ..types import PackedBatch
from .block_parts import Norm, text_block, vision_block
from .blocks import run_block
from .families import base_model, text_model, text_positions, vision_tower
from .recompute import Carry, Layer, run_layers, summed
from .vision import BlockCall, Features, encode_patches

WITH_WEIGHTS = "with_weights"
"""Name of the method, `method(make, *arguments)`, of a layer's module whose weights come and go
(fsdp.py): it calls the function that `make()` makes of them, while they are there."""


@dataclass
class LayerRun:
    """How the layers of a model are computed."""

    fused: bool = True
    """By fused operators; else by transformers' own modules."""
    recompute_text: int = 0
    """How many text layers, the first ones, are run again in the backward pass."""
    recompute_vision: int = 0
    """The same for the blocks of the vision tower."""
    offload: bool = False
    """Store the inputs of layers that are run again in host memory."""


def lm_head_weight(model: nn.Module) -> Tensor:
    """Return the LM head's weight (V, D)."""
    return base_model(model).lm_head.weight


def trains_vision(model: nn.Module) -> bool:
    """Return whether any part of the vision tower is trained."""
    tower = vision_tower(model)
    return tower is not None and any(p.requires_grad for p in tower.parameters())


def trained_layers(model: nn.Module) -> tuple[int, int]:
    """Count the layers that may be run again in the backward pass: text layers, vision blocks."""
    blocks = len(vision_tower(model).blocks) if trains_vision(model) else 0
    return len(text_model(model).layers), blocks


def packed_hidden(
    model: nn.Module,
    batch: PackedBatch,
    run: LayerRun | None = None,
    past_key_values: object | None = None,
) -> Tensor:
    """Return the final hidden states (N, D) of the rows that carry loss, in the model's dtype.

    `past_key_values` is a cache like those of transformers, which collects each layer's keys and
    values, or None.
    """
    run = run or LayerRun()
    text = text_model(model)
    x = text.embed_tokens(batch.input_ids)
    after = None
    if batch.pixel_values is not None:
        features = image_features(model, batch.pixel_values, batch.image_grid_thw, run)
        x = place_features(model, batch.input_ids, x, features.tokens)
        if features.deepstack:
            rows = image_rows(model, batch.input_ids, len(features.tokens))
            after = partial(_add_next, rows, features.deepstack)
        del features  # each is needed for a while only
    angles = text_angles(text, x, batch.position_ids)
    layers = [
        text_layer(layer, angles, batch.segments, run.fused, past_key_values)
        for layer in text.layers
    ]
    carry = run_layers(layers, (x, None), run.recompute_text, run.offload, after)
    return final_hidden(text, carry, run.fused).index_select(0, batch.loss_rows)


# --- text -----------------------------------------------------------------------------------------


def text_angles(text: nn.Module, x: Tensor, positions: Tensor) -> tuple[Tensor, Tensor]:
    """Compute the cosines and sines (T, d) of M-RoPE positions (3, T), in the dtype of x (T, D)."""
    cos, sin = text.rotary_emb(x[None], text_positions(text, positions))
    return cos[0], sin[0]


def text_layer(
    layer: nn.Module,
    angles: tuple[Tensor, Tensor],
    segments: Segments,
    fused: bool = True,
    cache: object | None = None,
) -> Layer:
    """Return a text layer as a function of (residual, update).

    It uses the weights that the layer has now, so a layer whose weights come and go is built anew.
    """
    return _with_weights(layer, partial(_text_layer, layer, angles, segments, fused, cache))


def _text_layer(
    layer: nn.Module,
    angles: tuple[Tensor, Tensor],
    segments: Segments,
    fused: bool,
    cache: object | None,
) -> Layer:
    if fused and (block := text_block(layer)):
        return partial(run_block, block, angles=angles, segments=segments, cache=cache)
    arguments = dict(
        attention_mask=None,
        position_embeddings=tuple(each[None] for each in angles),
        past_key_values=cache,
        use_cache=cache is not None,
        segments=segments,
    )
    return partial(_run_module, layer, arguments=arguments, as_batch=True)


def _with_weights(module: nn.Module, make: Callable[[], Layer]) -> Layer:
    """Return the layer that `make` makes of the weights of a module, as soon as they are there.

    It is made once: when it runs again in the backward pass, the weights are the same tensors.
    """
    method = getattr(module, WITH_WEIGHTS, None)
    return make() if method is None else partial(method, functools.cache(make))


def final_hidden(text: nn.Module, carry: Carry, fused: bool = True) -> Tensor:
    """Compute the final norm (T, D) of the last layer's hidden state."""
    residual, update = carry
    if update is None or not fused:
        return text.norm(summed(carry))
    norm = Norm.of(text.norm)
    return add_norm(residual, update, norm.weight, norm.bias, norm.eps)[1]


def _run_module(
    module: nn.Module,
    residual: Tensor,
    update: Tensor | None,
    arguments: dict,
    as_batch: bool = False,
    remember=None,
    again: bool = False,
) -> Carry:
    """Compute a layer by transformers' own module, as `run_block` does by fused operators.

    as_batch: whether the module takes (1, T, D).
    """
    hidden = summed((residual, update))
    if remember is not None:
        remember(hidden)
    if not as_batch:
        return module(hidden, **arguments), None
    return module(hidden.unsqueeze(0), **arguments).squeeze(0), None


# --- images ---------------------------------------------------------------------------------------


def image_features(
    model: nn.Module, pixel_values: Tensor, image_grid_thw: Tensor, run: LayerRun
) -> Features:
    """Compute the features of images in the order of their tokens.

    `pixel_values` (P, C·t·p·p) and `image_grid_thw` (I, 3) hold the images.
    """
    blocks = partial(_run_vision_blocks, run)
    with torch.set_grad_enabled(trains_vision(model) and torch.is_grad_enabled()):
        return encode_patches(vision_tower(model), pixel_values, image_grid_thw, blocks)


def place_features(
    model: nn.Module, input_ids: Tensor, embeddings: Tensor, features: Tensor
) -> Tensor:
    """Return the embeddings (T, D) with the features (M, D) in the place of image tokens."""
    is_image = _is_image(model, input_ids).unsqueeze(-1)
    return embeddings.masked_scatter(is_image, features.to(embeddings.dtype))


def image_rows(model: nn.Module, input_ids: Tensor, count: int) -> Tensor:
    """Return which of the tokens (T,) are image tokens: `count` of them, (count,) int64.

    As their number is known, the host does not wait for the device.
    """
    return torch.nonzero_static(_is_image(model, input_ids), size=count)[:, 0]


def _is_image(model: nn.Module, input_ids: Tensor) -> Tensor:
    return input_ids == base_model(model).config.image_token_id


def add_deepstack(carry: Carry, rows: Tensor, feature: Tensor) -> Carry:
    """Add a deepstack feature (M, D) to the hidden states of the image tokens.

    Nothing but the feature's rows is kept for the backward pass.
    """
    residual, update = carry
    feature = feature.to(residual.dtype)
    if update is None:
        return residual.index_add(0, rows, feature), None
    return residual, update.index_add(0, rows, feature)


def _add_next(rows: Tensor, features: list[Tensor], index: int, carry: Carry) -> Carry:
    """Add the first feature that is left, after each layer; whoever adds it lets go of it."""
    return add_deepstack(carry, rows, features.pop(0)) if features else carry


def _run_vision_blocks(
    run: LayerRun, patches: Tensor, calls: list[BlockCall]
) -> tuple[Tensor, list[Tensor]]:
    """Run the blocks of the vision tower on embedded patches (P, D), as `RunBlocks` says."""
    layers = [vision_layer(call, run.fused) for call in calls]
    features: list[Tensor] = []

    def merge(index: int, carry: Carry) -> Carry:
        merger = calls[index].merger
        if merger is None:
            return carry
        hidden = summed(carry)
        if torch.is_grad_enabled() and index < run.recompute_vision:
            features.append(checkpoint(merger, hidden, use_reentrant=False))
        else:
            features.append(merger(hidden))
        return hidden, None  # the next block keeps the tensor that the merger keeps

    carry = run_layers(layers, (patches, None), run.recompute_vision, run.offload, merge)
    return summed(carry), features


def vision_layer(call: BlockCall, fused: bool = True) -> Layer:
    """Return a vision block, with the weights that it has now, as a function like `text_layer`."""
    return _with_weights(call.block, partial(_vision_layer, call, fused))


def _vision_layer(call: BlockCall, fused: bool) -> Layer:
    block = vision_block(call.block) if fused else None
    if block is None:
        return partial(_run_module, call.block, arguments=call.arguments)
    bounds, longest = call.arguments["cu_seqlens"], call.arguments.get("max_seqlen")
    return partial(
        run_block,
        block,
        angles=call.arguments["position_embeddings"],
        cu_seq_lens_q=bounds,
        cu_seq_lens_k=bounds,
        max_length_q=longest,
        max_length_k=longest,
        is_causal=False,
    )
