"""The vision tower with its loop over blocks in our hands.

transformers' forward of the tower embeds the patches, makes rotary angles and, for Qwen2.5-VL,
sorts patches into windows; then it calls its blocks, one after the other, and merges. Qwen3-VL's
also merges what some blocks in its middle give: its deepstack features. Here the blocks and all
mergers are replaced, for the time of a call, by stand-ins that note what each block is told and
which merger follows it. The one for the last merger hands over all blocks at once.

`begin_patches` and `merge_patches` are the tower in two calls, between which the blocks can be run
at any time.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial

from torch import Tensor, nn

from .families import DEEPSTACK_MERGERS, deepstack_mergers


@dataclass
class BlockCall:
    """What transformers tells one block of the tower beside its input."""

    block: nn.Module
    arguments: dict
    """`cu_seqlens`, `position_embeddings` and, in newer versions, `max_seqlen`."""
    merger: nn.Module | None = None
    """Makes a deepstack feature (M, D) of the block's result (P, D), if the block has one."""


@dataclass
class Features:
    """What the tower makes of the M image tokens of a pack."""

    tokens: Tensor
    """(M, D): what stands in the place of the image tokens' embeddings."""
    deepstack: list[Tensor] = field(default_factory=list)
    """(M, D) each: the i-th is added to their hidden states after decoder layer i."""


RunBlocks = Callable[[Tensor, list[BlockCall]], tuple[Tensor, list[Tensor]]]
"""Maps embedded patches (P, D) to the last block's hidden states and the deepstack features."""
_Merge = Callable[[Tensor, list[BlockCall]], Tensor]
"""Stands in the place of the last merger: gets the embedded patches and how to call each block."""


def encode_patches(visual: nn.Module, pixels: Tensor, grid: Tensor, run: RunBlocks) -> Features:
    """Compute the features of images, with `run` in the place of the loop over blocks.

    pixels (P, C·t·p·p), grid (I, 3): as transformers' tower takes them.
    """
    deepstack: list[Tensor] = []

    def merge(patches: Tensor, calls: list[BlockCall]) -> Tensor:
        hidden, features = run(patches, calls)
        deepstack.extend(features)
        return visual.merger(hidden)

    return Features(_call(visual, pixels, grid, merge), deepstack)


def begin_patches(
    visual: nn.Module, pixels: Tensor, grid: Tensor
) -> tuple[Tensor, list[BlockCall]]:
    """Embed patches: the input (P, D) of the first block, and what each block must be told.

    The arguments are those of `encode_patches`.
    """
    noted: list[tuple[Tensor, list[BlockCall]]] = []

    def note(patches: Tensor, calls: list[BlockCall]) -> Tensor:
        noted.append((patches, calls))
        return patches

    _call(visual, pixels, grid, note)
    return noted[0]


def merge_patches(visual: nn.Module, hidden: Tensor, grid: Tensor) -> Tensor:
    """Compute the features (M, D) of images from the last block's hidden states (P, D)."""
    tower = _with_parts(visual, {"patch_embed": nn.Identity()})
    # The merger gets `hidden` here: what the tower carries to its place is not read, so that one
    # number a patch is enough to begin with. A tower that adds learned positions widens it.
    return _call(tower, hidden[:, :1], grid, lambda *_: visual.merger(hidden))


def _call(visual: nn.Module, pixels: Tensor, grid: Tensor, merge: _Merge) -> Tensor:
    """Call the tower with stand-ins for its blocks and mergers, and `merge` in the last one."""
    calls: list[BlockCall] = []

    def note_block(block: nn.Module, hidden: Tensor, **arguments) -> Tensor:
        calls.append(BlockCall(block, arguments))
        return hidden

    def note_merger(merger: nn.Module, hidden: Tensor) -> Tensor:
        calls[-1].merger = merger
        return hidden

    parts = {
        "blocks": nn.ModuleList(_StandIn(partial(note_block, block)) for block in visual.blocks),
        "merger": _StandIn(lambda patches: merge(patches, calls)),
    }
    if mergers := deepstack_mergers(visual):
        stand_ins = (_StandIn(partial(note_merger, merger)) for merger in mergers)
        parts[DEEPSTACK_MERGERS] = nn.ModuleList(stand_ins)
    return _with_parts(visual, parts)(pixels, grid_thw=grid, return_dict=True).pooler_output


class _StandIn(nn.Module):
    """Stands for a part of the tower: calls a function instead."""

    def __init__(self, function: Callable[..., Tensor]):
        super().__init__()
        self.function = function

    def forward(self, hidden_states: Tensor, **arguments) -> Tensor:
        return self.function(hidden_states, **arguments)


def _with_parts(visual: nn.Module, parts: dict[str, nn.Module]) -> nn.Module:
    """Return the tower with some of its parts replaced; it shares all others."""
    tower = copy.copy(visual)
    tower.__dict__["_modules"] = visual._modules | parts
    return tower
