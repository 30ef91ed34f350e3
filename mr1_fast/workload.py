"""What a step computes on, in numbers of tokens: the settings' worst case, or a batch at hand."""

from dataclasses import dataclass

import torch
from torch import Tensor

from .config import TrainConfig
from .packing import packs
from .types import PackedBatch, Prompt


@dataclass
class Workload:
    """What one step computes on: B prompts and B·G completions, in tokens."""

    prompts: list[int]
    """B: tokens of each prompt, image tokens included."""
    patches: list[int]
    """B: image patches of each prompt (4 to an image token)."""
    completions: list[int]
    """B·G: tokens of each completion; completion i belongs to prompt i // G."""

    @classmethod
    def largest(cls, config: TrainConfig, generations: int, count: int) -> "Workload":
        """`count` prompts as long as the settings allow, each with the largest image; completions of full length."""
        patches = 4 * min(config.max_pixels // (28 * 28), config.max_prompt_tokens)
        prompts = [config.max_prompt_tokens] * count
        return cls(prompts, [patches] * count, [config.max_new_tokens] * count * generations)

    def packs(self, tokens_per_pack: int) -> list[PackedBatch]:
        """As packing.py packs them; pixels without width."""
        prompts = []
        for length, patches in zip(self.prompts, self.patches, strict=True):
            images = (torch.empty(patches, 0), torch.tensor([[1, 1, patches]])) if patches else (None, None)
            positions = torch.zeros(3, length, dtype=torch.int64)
            prompts.append(Prompt(torch.zeros(length, dtype=torch.int64), positions, length, *images, patches // 4))
        completions = [torch.zeros(length, dtype=torch.int64) for length in self.completions]
        return list(packs(prompts, completions, tokens_per_pack))


def patches_of(batch: PackedBatch) -> Tensor:
    """(I,) int64: patches of each of a pack's images."""
    return torch.zeros(0, dtype=torch.int64) if batch.image_grid_thw is None else batch.image_grid_thw.prod(dim=1)
