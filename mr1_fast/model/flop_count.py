"""The FLOP that a model needs for a packed batch, counted by formula.

The count is the one of model FLOP utilisation (PaLM, Chowdhery et al., 2022, appendix B): what the
model's definition needs for the tokens that ran, whatever the implementation does besides.

- A linear layer with W weights on n rows is 2·W·n FLOP. Text layers have the T packed tokens as
  rows, the LM head the N rows with loss, the vision blocks P patches, and each of the mergers as
  many rows as there are image tokens.
- Attention is 4·(pairs of a query and a key that it sees)·heads·head_dim FLOP a layer: the scores
  and the sum of values.
- A backward pass adds the same again for the gradient of the inputs, where something below is
  trained, and for the gradient of the weights, where they are trained. For attention, which has no
  weights but two inputs to either product, it adds twice the forward.

What is recomputed in the backward pass is not counted a second time, and neither is padding. Norms,
activations, softmax, positions, the embedding's rows and the loss are left out, as in PaLM: they
are no matrix products.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

from torch import nn
from transformers import PretrainedConfig

from ..segments import Segments
from ..types import PackedBatch
from .families import (
    deepstack_blocks,
    deepstack_mergers,
    family_of,
    mlp_width,
    patches_per_token,
    text_model,
    vision_tower,
)
from .forward import lm_head_weight

PATCH_EMBEDDING, POSITIONS, BLOCKS, MERGERS = "patches", "positions", "blocks", "mergers"
EMBEDDING, LAYERS, HEAD = "embedding", "layers", "head"


class Flop(NamedTuple):
    """FLOP of the two passes over a batch; sums of integers, so they are exact."""

    forward: int
    backward: int


@dataclass(frozen=True)
class Trained:
    """Which parts of a model are trained, each of them as a whole or not at all."""

    parts: frozenset[str] = frozenset()
    """The parts, as `_parts` and HEAD name them, whose own weights are trained."""
    rank: int = 0
    """Rank of the LoRA adapters beside the linear layers of all text layers; 0 without adapters."""

    @classmethod
    def of(cls, model: nn.Module) -> Trained:
        """Read from a model, which PEFT may have wrapped, what is trained."""
        parts, rank = set(), 0
        for part, modules in _parts(model).items():
            for name, parameter in nn.ModuleList(modules).named_parameters():
                if not parameter.requires_grad:
                    continue
                if "lora_" not in name:
                    parts.add(part)
                elif "lora_A" in name:
                    rank = parameter.shape[0]
        if lm_head_weight(model).requires_grad:
            parts.add(HEAD)
        return cls(frozenset(parts), rank)


def _parts(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Return the modules of a model's parts; the LM head, which may be tied, is not among them."""
    text, tower = text_model(model), vision_tower(model)
    parts = {EMBEDDING: [text.embed_tokens], LAYERS: [text.layers]}
    if tower is None:
        return parts
    positions = getattr(tower, "pos_embed", None)
    return parts | {
        PATCH_EMBEDDING: [tower.patch_embed],
        POSITIONS: [positions] if positions is not None else [],
        BLOCKS: [tower.blocks],
        MERGERS: [tower.merger, *deepstack_mergers(tower)],
    }


FROZEN = Trained()
"""A model without adapters that computes no gradients, as the KL's reference is."""


def count_flop(config: PretrainedConfig, batch: PackedBatch, trained: Trained = FROZEN) -> Flop:
    """Count the FLOP of a forward and a backward pass over a batch, whose tensors are on the CPU.

    `config` is the one of the whole model. The backward pass of a model that trains nothing has 0
    FLOP.
    """
    count = _Count()
    if batch.image_grid_thw is not None:
        _count_vision(count, config, batch.image_grid_thw.tolist(), trained.parts)

    text, tokens = config.get_text_config(), batch.input_ids.numel()
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
    vision, tower = config.vision_config, family_of(config).vision
    patches = sum(t * h * w for t, h, w in images)
    width, between = getattr(vision, tower.width), mlp_width(vision, tower)
    into_mlp = [(width, between)] * (2 if tower.has_gated_mlp else 1)

    numbers = vision.in_channels * vision.temporal_patch_size * vision.patch_size**2
    count.linear(patches, [(numbers, width)], PATCH_EMBEDDING in parts)

    own = BLOCKS in parts
    count.below |= own or POSITIONS in parts  # the first norm, and what is added before it
    for pairs in _pairs_of_blocks(images, vision):
        count.linear(patches, [(width, 3 * width)], own)
        count.attention(pairs, width)
        count.linear(patches, [(width, width)], own)
        count.linear(patches, into_mlp, own)
        count.linear(patches, [(between, width)], own)

    merged, below = width * patches_per_token(config), count.below
    rows = patches // patches_per_token(config)
    for _ in range(1 + len(deepstack_blocks(vision))):
        count.below = below or MERGERS in parts  # its norm
        count.linear(rows, [(merged, merged)], MERGERS in parts)
        count.linear(rows, [(merged, getattr(vision, tower.out_width))], MERGERS in parts)


def _pairs_of_blocks(images: list[list[int]], vision: PretrainedConfig) -> list[int]:
    """Count the pairs of patches that see one another, in each of the blocks."""
    whole = image_pairs(images)
    full = getattr(vision, "fullatt_block_indexes", None)
    if full is None:
        return [whole] * vision.depth
    within = window_pairs(images, vision)
    return [whole if index in full else within for index in range(vision.depth)]


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
