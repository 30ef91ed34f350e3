"""The vision tower with its loop over blocks in our hands.

transformers' forward of the tower embeds the patches, makes rotary angles and, for Qwen2.5-VL,
sorts patches into windows; then it calls its blocks, one after the other, and merges. Here the
blocks are replaced, for the time of a call, by stand-ins that note what each block is told. The
last one of them hands over all blocks at once.
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

    class Note(nn.Module):
        """Stands for a block: notes how it is called."""

        def __init__(self, block: nn.Module, is_last: bool):
            super().__init__()
            self.__dict__.update(block=block, is_last=is_last)  # not as a submodule

        def forward(self, hidden_states: Tensor, **arguments) -> Tensor:
            calls.append(BlockCall(self.block, arguments))
            return run(hidden_states, calls) if self.is_last else hidden_states

    blocks, tower = visual.blocks, copy.copy(visual)
    tower.__dict__["_modules"] = dict(visual._modules)
    last = len(blocks) - 1
    tower.blocks = nn.ModuleList(Note(block, index == last) for index, block in enumerate(blocks))
    return tower(pixels, grid_thw=grid, return_dict=True).pooler_output
