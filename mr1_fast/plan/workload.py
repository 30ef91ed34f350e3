"""What a step computes on, in numbers of tokens: the settings' worst case, or a batch at hand."""

from dataclasses import dataclass

import torch
from torch import Tensor
from transformers import PretrainedConfig

from ..config import TrainConfig
from ..model.families import patches_per_token, pixels_per_token
from ..packing import packs
from ..types import PackedBatch, Prompt

QUESTION_TOKENS = 32
"""Tokens that a prompt has at least, beside its image if it has one."""


@dataclass
class Workload:
    """B prompts with G completions each, by their numbers of tokens."""

    prompts: list[int]
    """B: tokens of each prompt, image tokens included."""
    patches: list[int]
    """B: image patches of each prompt, several for each image token; 0 for text alone."""
    completions: list[int]
    """B·G: tokens of each completion; completion i belongs to prompt i // G."""

    @classmethod
    def largest(
        cls, config: TrainConfig, model_config: PretrainedConfig, generations: int, count: int
    ) -> "Workload":
        """The worst case of `count` prompts with `generations` completions each.

        Prompts and completions are as long as the settings allow, each prompt with the largest
        image if the model reads images.
        """
        patches = largest_image(config, model_config)
        prompt, completion = config.max_prompt_tokens, config.max_new_tokens
        return cls._equal(count, generations, prompt, patches, completion)

    @classmethod
    def _equal(
        cls, count: int, generations: int, prompt: int, patches: int, completion: int
    ) -> "Workload":
        """`count` equal prompts, `prompt` tokens and an image of `patches`, with completions."""
        return cls([prompt] * count, [patches] * count, [completion] * count * generations)

    @classmethod
    def full_packs(
        cls, config: TrainConfig, model_config: PretrainedConfig, generations: int
    ) -> list[list[PackedBatch]]:
        """Packs that groups of shorter completions fill up.

        The prompts are the longest or the shortest, and as many as one pack can hold or half of
        that, so that packs with few and with many images are among them.
        """
        budget, filled = config.tokens_per_microbatch, []
        patches, image = largest_image(config, model_config), image_tokens(config, model_config)
        shortest = min(config.max_prompt_tokens, image + QUESTION_TOKENS)
        for prompt in (config.max_prompt_tokens, shortest):
            most = min(config.prompts_per_step, budget // (prompt + generations))
            for count in {most, max(1, most // 2)} if most else ():
                inputs = min(config.max_new_tokens - 1, (budget // count - prompt) // generations)
                work = cls._equal(count, generations, prompt, patches, inputs + 1)
                filled.append(work.packs(budget))
        return filled

    @property
    def group(self) -> int:
        """G, the completions of each prompt."""
        return len(self.completions) // len(self.prompts)

    def first_sample(self) -> "Workload":
        """The first prompt with one completion, the longest of all."""
        return Workload(self.prompts[:1], self.patches[:1], [max(self.completions)])

    def prompt_pack(self, most_prompts: int, tokens_per_pack: int) -> PackedBatch:
        """The first pack of the first `most_prompts` prompts alone, as the rollout encodes them."""
        prompts = self.prompts[:most_prompts]
        alone = Workload(prompts, self.patches[:most_prompts], [1] * len(prompts))
        return alone.packs(tokens_per_pack)[0]

    def packs(self, tokens_per_pack: int) -> list[PackedBatch]:
        """The packs that packing.py makes of the prompts and completions.

        Token ids are 0 and pixels take no memory: what counts is shapes.
        """
        prompts = [
            _prompt(length, patches)
            for length, patches in zip(self.prompts, self.patches, strict=True)
        ]
        completions = [torch.zeros(length, dtype=torch.int64) for length in self.completions]
        return list(packs(prompts, completions, tokens_per_pack))


def _prompt(length: int, patches: int) -> Prompt:
    """A prompt of `length` tokens with one image of `patches` patches, or with none."""
    pixels = grid = None
    if patches:
        pixels, grid = torch.empty(patches, 0), torch.tensor([[1, 1, patches]])
    return Prompt(
        input_ids=torch.zeros(length, dtype=torch.int64),
        position_ids=torch.zeros(3, length, dtype=torch.int64),
        next_position=length,
        pixel_values=pixels,
        image_grid_thw=grid,
        num_image_tokens=patches,  # packing asks only whether there are any
    )


def image_tokens(config: TrainConfig, model_config: PretrainedConfig) -> int:
    """Tokens of the largest image that the settings allow; 0 for a model of text alone."""
    pixels = pixels_per_token(model_config)
    return min(config.max_pixels // pixels, config.max_prompt_tokens) if pixels else 0


def largest_image(config: TrainConfig, model_config: PretrainedConfig) -> int:
    """Patches of the largest image that the settings allow; 0 for a model of text alone."""
    return patches_per_token(model_config) * image_tokens(config, model_config)


def patches_of(batch: PackedBatch) -> Tensor:
    """(I,) int64: patches of each image of a pack."""
    if batch.image_grid_thw is None:
        return torch.zeros(0, dtype=torch.int64)
    return batch.image_grid_thw.prod(dim=1)
