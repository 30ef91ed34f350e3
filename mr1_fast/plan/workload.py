"""What a step computes on, in numbers of tokens: the settings' worst case, or a batch at hand."""

from dataclasses import dataclass

import torch
from torch import Tensor

from ..config import TrainConfig
from ..packing import packs
from ..types import PackedBatch, Prompt


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
        prompts, completions = (
            [config.max_prompt_tokens] * count,
            [config.max_new_tokens] * count * generations,
        )
        return cls(prompts, [4 * image_tokens(config)] * count, completions)

    @classmethod
    def full_packs(cls, config: TrainConfig, generations: int) -> list[list[PackedBatch]]:
        """Packs that are filled by groups of shorter completions, with few and with as many images as there can be."""
        budget, packs = config.tokens_per_microbatch, []
        image = image_tokens(config)
        shortest = min(
            config.max_prompt_tokens, image + 32
        )  # a question takes some tokens beside its image
        for prompt in (config.max_prompt_tokens, shortest):
            most = min(config.prompts_per_step, budget // (prompt + generations))
            for count in {most, max(1, most // 2)} if most else ():
                inputs = min(config.max_new_tokens - 1, (budget // count - prompt) // generations)
                work = cls(
                    [prompt] * count, [4 * image] * count, [inputs + 1] * count * generations
                )
                packs.append(work.packs(budget))
        return packs

    def packs(self, tokens_per_pack: int) -> list[PackedBatch]:
        """As packing.py packs them; pixels without width."""
        prompts = []
        for length, patches in zip(self.prompts, self.patches, strict=True):
            images = (
                (torch.empty(patches, 0), torch.tensor([[1, 1, patches]]))
                if patches
                else (None, None)
            )
            positions = torch.zeros(3, length, dtype=torch.int64)
            prompts.append(
                Prompt(
                    torch.zeros(length, dtype=torch.int64), positions, length, *images, patches // 4
                )
            )
        completions = [torch.zeros(length, dtype=torch.int64) for length in self.completions]
        return list(packs(prompts, completions, tokens_per_pack))


def image_tokens(config: TrainConfig) -> int:
    """Of the largest image that the settings allow."""
    return min(config.max_pixels // (28 * 28), config.max_prompt_tokens)


def patches_of(batch: PackedBatch) -> Tensor:
    """(I,) int64: patches of each of a pack's images."""
    return (
        torch.zeros(0, dtype=torch.int64)
        if batch.image_grid_thw is None
        else batch.image_grid_thw.prod(dim=1)
    )
