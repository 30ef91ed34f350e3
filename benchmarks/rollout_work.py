"""What bench_rollout.py samples: a model, prompts, and a prescribed length of each sample."""

import math
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from PIL import Image
from random_models import model_config, processor_of, random_model, tiny_of
from torch import nn

from mr1_fast.kernels.four_bit.weight import FourBitWeight
from mr1_fast.model.families import base_model, text_model
from mr1_fast.model.joined_weights import join_weights
from mr1_fast.model.processor import Processor
from mr1_fast.model.prompt import PromptEncoder
from mr1_fast.model.tiny import tiny_model, tiny_processor
from mr1_fast.rollout.cache import token_bytes
from mr1_fast.tasks.data import load_examples
from mr1_fast.types import Example, Prompt

GROUP = 8
IMAGE_SIZE = (896, 448)
MEDIAN, SIGMA, MOST = 48, 1.0, 256
"""Completion lengths with a long tail: median and σ of the log-normal, and where it is clipped."""
BATCH = 16
"""Prompts of a batch of part `stream`."""


@dataclass
class Work:
    """A model, B prompts, and how many tokens each of their B·G samples has, G = `group`."""

    model: nn.Module
    processor: Processor
    examples: list[Example]
    prompts: list[Prompt]
    lengths: list[int]
    warm_up_tokens: int
    """The most tokens of a sample while a baseline warms up."""
    group: int = GROUP
    in_batches: bool = False
    """Whether prompts come BATCH at a time, so that there are more steps than the longest has."""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        processor,
        examples: list[Example],
        lengths: list[int],
        warm_up_tokens: int,
        group: int = GROUP,
    ) -> "Work":
        """The work of these examples, whose prompts are encoded here.

        Weights on the same input are moved next to one another, as those of a loaded policy are.
        """
        join_weights(text_model(model).layers)
        encode = PromptEncoder(model, processor, max_prompt_tokens=2**31, max_pixels=2**31)
        prompts = [encode(example) for example in examples]
        return cls(model.eval(), processor, examples, prompts, lengths, warm_up_tokens, group)

    @property
    def device(self) -> torch.device:
        return base_model(self.model).lm_head.weight.device

    def least_bytes(self) -> int:
        """Bytes that steps which all unfinished samples share must read after the first tokens."""
        base = base_model(self.model)
        text = text_model(base)
        read = (*text.layers.parameters(), text.norm.weight, base.lm_head.weight)
        weights = sum(each.nbytes for each in read) + scale_bytes(text.layers)

        # A prompt is read as long as its group runs.
        longest = np.array(self.lengths).reshape(-1, self.group).max(axis=1).tolist()
        pairs = zip(self.prompts, longest, strict=True)
        prompts = sum(len(prompt.input_ids) * (steps - 1) for prompt, steps in pairs)
        own = sum(n * (n - 1) // 2 for n in self.lengths)
        return (max(self.lengths) - 1) * weights + token_bytes(text) * (prompts + own)


def scale_bytes(layers: nn.Module) -> int:
    """Bytes of the scales of weights in 4 bits, which are no parameters."""
    # A layer of peft shows the weight of the layer under it as its own.
    stored = (module for module in layers.modules() if not hasattr(module, "base_layer"))
    found = (FourBitWeight.of(module) for module in stored)
    return sum(weight.nbytes - weight.packed.nbytes for weight in found if weight)


def stream_work(quick: bool, device: str) -> Work:
    """256 prompts with a sample each, BATCH at a time."""
    work = tail_work(256, 1, quick, device)
    work.in_batches = True
    return work


def tail_work(prompts: int, group: int, quick: bool, device: str) -> Work:
    """Prompts of the tiny model whose samples are a few long among many short ones."""
    median, most = (6, 16) if quick else (MEDIAN, MOST)
    prompts = prompts // 8 if quick else prompts
    processor = tiny_processor()
    torch.manual_seed(0)
    model = tiny_model(processor).to(device)
    examples = load_examples("counting", "drawn", "train", 0, 1).all(prompts)
    lengths = np.random.default_rng(0).lognormal(math.log(median), SIGMA, prompts * group)
    lengths = lengths.round().clip(1, most).astype(int).tolist()
    return Work.of(model, processor, examples, lengths, most, group)


def image_work(
    size: str, tokens: int, quick: bool, device: str, layers: int | None = None, **kind: bool
) -> Work:
    """8 prompts of an image of IMAGE_SIZE and some text × 8 samples of so many tokens.

    size, layers: of the model, which `random_model` makes of this kind; with `quick` a tiny one of
    its family.
    """
    prompts, (width, height) = (2, (84, 84)) if quick else (8, IMAGE_SIZE)
    processor = processor_of(size)
    torch.manual_seed(0)
    config = model_config(tiny_of(size) if quick else size, processor, layers)
    dtype = torch.float32 if quick or device == "cpu" else torch.bfloat16
    model = random_model(config, device, dtype, **kind)
    shape = prompts, height, width, 3
    noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    problem = "How many different items are there in the image?"
    examples = [Example(problem, (Image.fromarray(pixels),), "3") for pixels in noise]
    lengths = [8 if quick else tokens] * prompts * GROUP
    return Work.of(model, processor, examples, lengths, warm_up_tokens=8)


WORKS = {
    "tail": partial(tail_work, 16, GROUP),
    "long": partial(image_work, "2B", 512),
    "long_qwen3vl": partial(image_work, "Qwen3-VL-2B", 512),
    "prefix": partial(image_work, "2B", 64, layers=4),
    "lora": partial(image_work, "2B", 256, lora=True),
    "qlora": partial(image_work, "7B", 128, lora=True, four_bit=True),
    "stream": stream_work,
}
"""Part → its work, of whether sizes are small, and a device."""
