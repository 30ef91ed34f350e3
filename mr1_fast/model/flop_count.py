"""The FLOP that a model needs for a packed batch, counted by formula.

The count is the one of model FLOP utilisation (PaLM, Chowdhery et al., 2022, appendix B): what the
model's definition needs for the tokens that ran, whatever the implementation does besides.

- A linear layer with W weights on n rows is 2·W·n FLOP. Text layers have the T packed tokens as
  rows, the LM head the N rows with loss, the vision blocks P patches, and the merger P / 4.
- Attention is 4·(pairs of a query and a key that it sees)·heads·head_dim FLOP a layer: the scores
  and the sum of values.
- A backward pass adds the same again for the gradient of the inputs, where something below is
  trained, and for the gradient of the weights, where they are trained. For attention, which has no
  weights but two inputs to either product, it adds twice the forward.

What is recomputed in the backward pass is not counted a second time, and neither is padding. Norms,
activations, softmax, rotary angles, the embedding's rows and the loss are left out, as in PaLM:
they are no matrix products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import nn
from transformers import PretrainedConfig

from ..segments import Segments
from ..types import PackedBatch
from .forward import lm_head_weight

PATCH_EMBEDDING, BLOCKS, MERGER = "visual.patch_embed.", "visual.blocks.", "visual.merger."
EMBEDDING, LAYERS, HEAD = "embed_tokens.", "language_model.layers.", "lm_head."
PARTS = (PATCH_EMBEDDING, BLOCKS, MERGER, EMBEDDING, LAYERS, HEAD)
"""The parts of a model of the Qwen2-VL family, by what the names of their parameters contain."""


class Flop(NamedTuple):
    """FLOP of the two passes over a batch; sums of integers, so they are exact."""

    forward: int
    backward: int


@dataclass(frozen=True)
class Trained:
    """Which parts of a model are trained, each of them as a whole or not at all."""

    parts: frozenset[str] = frozenset()
    """The parts, by their names in PARTS, whose own weights are trained."""
    rank: int = 0
    """Rank of the LoRA adapters beside the linear layers of all text layers; 0 without adapters."""

    @classmethod
    def of(cls, model: nn.Module) -> Trained:
        """Read from a `…ForConditionalGeneration`, which PEFT may have wrapped, what is trained."""
        parts, rank = set(), 0
        for name, parameter in model.named_parameters():
            if not parameter.requires_grad:
                continue
            if "lora_" not in name:
                parts.update(part for part in PARTS if part in name)
            elif "lora_A" in name:
                rank = parameter.shape[0]
        if lm_head_weight(model).requires_grad:  # a tied head has the embedding's name alone
            parts.add(HEAD)
        return cls(frozenset(parts), rank)


FROZEN = Trained()
"""A model without adapters that computes no gradients, as the KL's reference is."""


def count_flop(config: PretrainedConfig, batch: PackedBatch, trained: Trained = FROZEN) -> Flop:
    """Count the FLOP of a forward and a backward pass over a batch, whose tensors are on the CPU.

    `config` is the one of a Qwen2-VL or Qwen2.5-VL. The backward pass of a model that trains
    nothing has 0 FLOP.
    """
    count = _Count()
    if batch.image_grid_thw is not None:
        _count_vision(count, config, batch.image_grid_thw.tolist(), trained.parts)

    text, tokens = config.text_config, batch.input_ids.numel()
    width, between = text.hidden_size, text.intermediate_size
    head_dim = getattr(text, "head_dim", None) or width // text.num_attention_heads
    queries, keys = text.num_attention_heads * head_dim, text.num_key_value_heads * head_dim
    pairs = causal_pairs(batch.segments)
    own, rank = LAYERS in trained.parts, trained.rank
    # The embedding and the norm before the first layer may be trained, too.
    count.below |= own or EMBEDDING in trained.parts
    for _ in range(text.num_hidden_layers):
        count.linear(tokens, [(width, queries), (width, keys), (width, keys)], own, rank)
        count.attention(pairs, queries)
        count.linear(tokens, [(queries, width)], own, rank)
        count.linear(tokens, [(width, between), (width, between)], own, rank)
        count.linear(tokens, [(between, width)], own, rank)

    count.linear(batch.targets.numel(), [(width, text.vocab_size)], HEAD in trained.parts)
    return Flop(count.forward, count.backward)


class _Count:
    """Sums of FLOP, in the order in which the forward pass computes."""

    def __init__(self) -> None:
        self.forward = self.backward = 0
        self.below = False
        """Whether anything that has been counted so far is trained, so that gradients go on."""

    def linear(
        self, rows: int, shapes: list[tuple[int, int]], trained: bool, rank: int = 0
    ) -> None:
        """Add linear layers that share their input, by their (inputs, outputs), on so many rows.

        Beside each are adapters A (rank × inputs) and B (outputs × rank) of a `rank` above 0.
        """
        weights = sum(inputs * outputs for inputs, outputs in shapes)
        first = rank * sum(inputs for inputs, _ in shapes)
        second = rank * sum(outputs for _, outputs in shapes)
        self.forward += 2 * rows * (weights + first + second)
        self.backward += 2 * rows * weights * (self.below + trained)
        self.backward += 2 * rows * (first * (self.below + 1) + second * 2)
        self.below |= trained or rank > 0

    def attention(self, pairs: int, width: int) -> None:
        """Add attention between so many pairs of a query and a key; `width` is heads · head_dim."""
        flop = 4 * pairs * width
        self.forward += flop
        self.backward += 2 * flop * self.below


def causal_pairs(segments: Segments) -> int:
    """Count the pairs of a query and a key that it sees.

    Of a segment with lq queries and lk keys, query i sees lk − lq + i + 1 keys.
    """
    queries, keys = (
        bounds.diff().tolist() for bounds in (segments.cu_seqlens_q, segments.cu_seqlens_k)
    )
    return sum(lq * (lk - lq) + lq * (lq + 1) // 2 for lq, lk in zip(queries, keys, strict=True))


# --- the vision tower -----------------------------------------------------------------------------


def _count_vision(
    count: _Count, config: PretrainedConfig, images: list[list[int]], parts: frozenset[str]
) -> None:
    """Add the vision tower on images of (frames, patches down, patches across) each."""
    vision, patches = config.vision_config, sum(t * h * w for t, h, w in images)
    if config.model_type == "qwen2_vl":
        width, out_width = vision.embed_dim, vision.hidden_size
        between = int(width * vision.mlp_ratio)
        into_mlp = [(width, between)]
        windowed = 0
    else:
        width, out_width = vision.hidden_size, vision.out_hidden_size
        between = vision.intermediate_size
        into_mlp = [(width, between), (width, between)]
        windowed = sum(index not in vision.fullatt_block_indexes for index in range(vision.depth))

    numbers = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    count.linear(patches, [(numbers, width)], PATCH_EMBEDDING in parts)

    whole, within = image_pairs(images), windowed and window_pairs(images, vision)
    own = BLOCKS in parts
    count.below |= own  # its first norm
    for index in range(vision.depth):
        count.linear(patches, [(width, 3 * width)], own)
        # Which blocks have windows makes no difference to the sums.
        count.attention(within if index < windowed else whole, width)
        count.linear(patches, [(width, width)], own)
        count.linear(patches, into_mlp, own)
        count.linear(patches, [(between, width)], own)

    unit = vision.spatial_merge_size**2
    merged = width * unit
    count.below |= MERGER in parts  # its norm
    count.linear(patches // unit, [(merged, merged)], MERGER in parts)
    count.linear(patches // unit, [(merged, out_width)], MERGER in parts)


def image_pairs(images: list[list[int]]) -> int:
    """Count the pairs of patches where each sees its whole frame; an image has one frame."""
    return sum(t * (h * w) ** 2 for t, h, w in images)


def window_pairs(images: list[list[int]], vision: PretrainedConfig) -> int:
    """Count the pairs of patches where each sees its own window, as in most of Qwen2.5-VL's blocks.

    Windows tile an image from its upper left corner; those at the other edges are smaller.
    """
    merge = vision.spatial_merge_size
    side = vision.window_size // merge // vision.patch_size * merge

    def squares(length: int) -> int:
        """Return the sum of the squared sides of the windows along `length` patches."""
        full, rest = divmod(length, side)
        return full * side**2 + rest**2

    return sum(t * squares(h) * squares(w) for t, h, w in images)
