"""The vision tower with its loop over blocks in our hands.

transformers' forward of the tower embeds the patches, makes rotary angles and, for Qwen2.5-VL,
sorts patches into windows; then it calls its blocks, one after the other, and merges. Here the
blocks are replaced, for the time of a call, by stand-ins that note what each block is told. The
last one of them hands over all blocks at once.

`begin_patches` and `merge_patches` are the tower in two calls, between which the blocks can be run
at any time.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


@dataclass
class BlockCall:
    """What transformers tells one block of the tower beside its input."""

    block: nn.Module
    arguments: dict
    """`cu_seqlens`, `position_embeddings` and, in newer versions, `max_seqlen`."""


RunBlocks = Callable[[Tensor, list[BlockCall]], Tensor]
"""Maps the embedded patches (P, D) to the last block's hidden states (P, D)."""


def encode_patches(visual: nn.Module, pixels: Tensor, grid: Tensor, run: RunBlocks) -> Tensor:
    """Compute the features (M, D) of images, with `run` in the place of the loop over blocks.

    pixels: (P, 3·2·14·14); grid: (I, 3), as transformers' tower takes them.
    """
    calls: list[BlockCall] = []
    *blocks, last = visual.blocks
    stand_ins = [*(_StandIn(block, calls) for block in blocks), _StandIn(last, calls, run)]
    tower = _with_part(visual, "blocks", nn.ModuleList(stand_ins))
    return tower(pixels, grid_thw=grid, return_dict=True).pooler_output


class _StandIn(nn.Module):
    """Stands for a block: notes how it is called, and calls `run` if it is the last one."""

    def __init__(self, block: nn.Module, calls: list[BlockCall], run: RunBlocks | None = None):
        super().__init__()
        self.__dict__.update(block=block, calls=calls, run=run)  # not as a submodule

    def forward(self, hidden_states: Tensor, **arguments) -> Tensor:
        self.calls.append(BlockCall(self.block, arguments))
        return self.run(hidden_states, self.calls) if self.run else hidden_states


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

    encode_patches(_with_part(visual, "merger", nn.Identity()), pixels, grid, note)
    return noted[0]


def merge_patches(visual: nn.Module, hidden: Tensor, grid: Tensor) -> Tensor:
    """Compute the features (M, D) of images from the last block's hidden states (P, D)."""
    tower = _with_part(visual, "patch_embed", nn.Identity())
    # One number a patch is all that the way to the last block's place is given to carry.
    return encode_patches(tower, hidden[:, :1], grid, lambda *_: hidden)


def _with_part(visual: nn.Module, name: str, part: nn.Module) -> nn.Module:
    """Return the tower with one of its parts replaced; it shares all others."""
    tower = copy.copy(visual)
    tower.__dict__["_modules"] = dict(visual._modules)
    setattr(tower, name, part)
    return tower
