"""Work and runners of bench_rollout.py: prompts with prescribed lengths, and ways to sample them.

A runner is built from a `Work`. Called with a length for each sample, it returns the number of
tokens that each one got.
"""

import math
import time
from contextlib import ExitStack
from dataclasses import dataclass, fields

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    AutoModelForImageTextToText,
    ContinuousBatchingConfig,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.utils import is_flash_attn_2_available

from mr1_fast.model.attention import use_packed_attention
from mr1_fast.model.forward import base_model
from mr1_fast.model.known import find_model_config
from mr1_fast.model.processor import ImageTextProcessor
from mr1_fast.model.prompt import PromptEncoder
from mr1_fast.model.tiny import tiny_model, tiny_processor
from mr1_fast.rollout.cache import token_bytes
from mr1_fast.rollout.engine import Engine
from mr1_fast.rollout.sampling import Sampling
from mr1_fast.tasks.data import load_examples
from mr1_fast.types import Example, Prompt

GROUP = 8
IMAGE_SIZE = (896, 448)
MEDIAN, SIGMA, MOST = 48, 1.0, 256
"""Completion lengths of part tail: median and σ of the log-normal, and where it is clipped."""
PATIENCE = 40.0
"""Seconds that continuous batching may take."""
PAGE = 256
"""Tokens of a block of continuous batching's cache: its default."""


@dataclass
class Work:
    """A model, B prompts, and how many tokens each of their B·G samples has."""

    model: nn.Module
    processor: ImageTextProcessor
    examples: list[Example]
    prompts: list[Prompt]
    lengths: list[int]
    warm_up_tokens: int
    """The most tokens of a sample while a baseline warms up."""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        processor,
        examples: list[Example],
        lengths: list[int],
        warm_up_tokens: int,
    ) -> "Work":
        """The work of these examples, whose prompts are encoded here."""
        encode = PromptEncoder(model, processor, max_prompt_tokens=2**31, max_pixels=2**31)
        prompts = [encode(example) for example in examples]
        return cls(model.eval(), processor, examples, prompts, lengths, warm_up_tokens)

    @property
    def device(self) -> torch.device:
        return base_model(self.model).lm_head.weight.device

    def least_bytes(self) -> int:
        """Bytes that steps which all unfinished samples share must read after the first tokens."""
        base = base_model(self.model)
        text = base.model.language_model
        read = (*text.layers.parameters(), text.norm.weight, base.lm_head.weight)
        weights = sum(each.nbytes for each in read)

        # A prompt is read as long as its group runs.
        longest = np.array(self.lengths).reshape(-1, GROUP).max(axis=1).tolist()
        pairs = zip(self.prompts, longest, strict=True)
        prompts = sum(len(prompt.input_ids) * (steps - 1) for prompt, steps in pairs)
        own = sum(n * (n - 1) // 2 for n in self.lengths)
        return (max(self.lengths) - 1) * weights + token_bytes(text) * (prompts + own)


def tail_work(quick: bool, device: str) -> Work:
    """The work of part `tail`: few long completions among many short ones."""
    prompts, median, most = (2, 6, 16) if quick else (16, MEDIAN, MOST)
    processor = tiny_processor()
    torch.manual_seed(0)
    model = tiny_model(processor).to(device)
    examples = load_examples("counting", "drawn", "train", 0, 1).all(prompts)
    lengths = np.random.default_rng(0).lognormal(math.log(median), SIGMA, prompts * GROUP)
    lengths = lengths.round().clip(1, most).astype(int).tolist()
    return Work.of(model, processor, examples, lengths, most)


def long_work(quick: bool, device: str) -> Work:
    """The work of parts `long` and `lora`; with `quick` of the tiny model."""
    prompts, tokens, (width, height) = (2, 8, (84, 84)) if quick else (8, 512, IMAGE_SIZE)
    processor = tiny_processor()
    torch.manual_seed(0)
    model = tiny_model(processor).to(device) if quick else random_2b(processor, device)
    shape = prompts, height, width, 3
    noise = np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)
    problem = "How many different items are there in the image?"
    examples = [Example(problem, (Image.fromarray(pixels),), "3") for pixels in noise]
    return Work.of(model, processor, examples, [tokens] * prompts * GROUP, warm_up_tokens=8)


def random_2b(processor: ImageTextProcessor, device: str) -> nn.Module:
    """A bf16 model of Qwen2-VL-2B's shape with random weights, for the tiny model's processor."""
    config = find_model_config("Qwen/Qwen2-VL-2B-Instruct")
    tokens = {
        "image": "image_pad",
        "video": "video_pad",
        "vision_start": "vision_start",
        "vision_end": "vision_end",
    }
    for name, token in tokens.items():
        token_id = processor.tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        setattr(config, f"{name}_token_id", token_id)
    with torch.device(device):
        return AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)


# --- runners


class Runner:
    """Samples completions of a work.

    Not timed are `prepare`, before a call, and `rest`, before the call of another runner. `release`
    frees what is kept between calls.
    """

    def __init__(self, work: Work):
        self.work = work

    def __call__(self, lengths: list[int]) -> list[int]:
        """Sample completions of `lengths` tokens; return how many tokens each one got."""
        raise NotImplementedError

    def prepare(self) -> None:
        pass

    def rest(self) -> None:
        pass

    def release(self) -> None:
        pass


class Prescribed(Engine):
    """An engine that ends each sample at its prescribed length and nowhere else."""

    lengths: list[int]

    def _ends(self, *arguments):
        return lambda sample, tokens: "length" if len(tokens) == self.lengths[sample] else None


class WithoutGraphs(Prescribed):
    """Our engine without CUDA graphs: the host launches kernels one by one and waits for them."""

    def _prepare(self, *arguments) -> None:
        super()._prepare(*arguments)
        self._graphs = None


class Ours(Runner):
    """Our engine, of class `kind`."""

    def __init__(self, work: Work, kind: type[Prescribed] = Prescribed):
        super().__init__(work)
        self.engine = kind(work.model, work.processor)
        self.sampling = Sampling(max_new_tokens=max(work.lengths))

    def prepare(self) -> None:
        use_packed_attention(base_model(self.work.model))

    def __call__(self, lengths: list[int]) -> list[int]:
        self.engine.lengths = lengths
        rollout = self.engine.generate(
            self.work.examples, GROUP, self.sampling, prompts=self.work.prompts
        )
        return [len(ids) for ids in rollout.completions]

    def release(self) -> None:
        self.engine.release()


def plain_sampling(work: Work, **settings) -> GenerationConfig:
    """transformers' settings for sampling at temperature 1 without filters and without EOS."""
    pad = work.processor.tokenizer.pad_token_id
    plain = {"do_sample": True, "temperature": 1.0, "top_k": 0, "top_p": 1.0}
    return GenerationConfig(**plain, pad_token_id=pad, **settings)


class RowsEnd(StoppingCriteria):
    """A criterion that ends each row at its own total length, behind which `generate` pads it."""

    eos_token_id = None  # `generate` pads if a criterion has this attribute

    def __init__(self, ends: Tensor):
        self.ends = ends

    def __call__(self, input_ids: Tensor, scores, **kwargs) -> Tensor:
        return self.ends <= input_ids.shape[1]


class Generate(Runner):
    """transformers' `generate` with `num_return_sequences`."""

    def __init__(self, work: Work):
        super().__init__(work)
        # It fills in what a call leaves open, among it an EOS.
        work.model.generation_config = plain_sampling(work)
        self.pad = work.processor.tokenizer.pad_token_id
        ids = [prompt.input_ids for prompt in work.prompts]
        ones = [torch.ones_like(each) for each in ids]
        from_left = {"batch_first": True, "padding_side": "left"}
        inputs = {
            "input_ids": pad_sequence(ids, padding_value=self.pad, **from_left),
            "attention_mask": pad_sequence(ones, **from_left),
            "pixel_values": torch.cat([prompt.pixel_values for prompt in work.prompts]),
            "image_grid_thw": torch.cat([prompt.image_grid_thw for prompt in work.prompts]),
        }
        inputs["mm_token_type_ids"] = (inputs["input_ids"] == work.processor.image_token_id).long()
        self.inputs = {name: x.to(work.device) for name, x in inputs.items()}

    def prepare(self) -> None:
        self.work.model.set_attn_implementation("sdpa")

    def __call__(self, lengths: list[int]) -> list[int]:
        start = self.inputs["input_ids"].shape[1]
        ends = start + torch.tensor(lengths, device=self.work.device)
        sampling = plain_sampling(
            self.work, num_return_sequences=GROUP, max_new_tokens=max(lengths)
        )
        criteria = StoppingCriteriaList([RowsEnd(ends)])
        ids = self.work.model.generate(
            **self.inputs, generation_config=sampling, stopping_criteria=criteria
        )
        # Behind the end there must be nothing but padding.
        inside = torch.arange(ids.shape[1], device=ids.device) < ends[:, None]
        return ((inside | (ids != self.pad)).sum(1) - start).tolist()


class ContinuousBatching(Runner):
    """transformers' continuous batching: a cache for all samples, one manager for all calls."""

    def __init__(self, work: Work):
        super().__init__(work)
        self.ids = [prompt.input_ids.tolist() for prompt in work.prompts for _ in range(GROUP)]
        pages = sum(-(-(len(x) + n) // PAGE) for x, n in zip(self.ids, work.lengths, strict=True))
        settings = {
            "num_blocks": pages + pages // 2,
            "max_batch_tokens": max(512, sum(map(len, self.ids)) // 16),
        }
        self.attention = "flash_attention_2" if is_flash_attn_2_available() else "paged|sdpa"
        known = {field.name for field in fields(ContinuousBatchingConfig)}
        if "auto_switch_to_flash" in known:  # in transformers after 5.17
            settings["auto_switch_to_flash"] = False  # it would ask the hub for kernels
            self.attention = self.attention.removeprefix("paged|")
        self.settings, self.open = ContinuousBatchingConfig(**settings), ExitStack()

    def prepare(self) -> None:
        self.work.model.set_attn_implementation(self.attention)
        manager = self.work.model.continuous_batching_context_manager(
            plain_sampling(self.work),
            timeout=10,
            continuous_batching_config=self.settings,
            persistent_manager=True,
        )
        self.manager = self.open.enter_context(manager)

    def __call__(self, lengths: list[int]) -> list[int]:
        start, found = time.perf_counter(), {}
        names = [
            self.manager.add_request(x, max_new_tokens=n)
            for x, n in zip(self.ids, lengths, strict=True)
        ]
        while len(found) < len(names):
            result = self.manager.get_result(timeout=1)
            if result is not None and result.is_finished():
                found[result.request_id] = result
            if result is not None and result.error:
                raise RuntimeError(result.error)
            stopped = result is None and not self.manager.is_running()
            if stopped or time.perf_counter() > start + PATIENCE:
                raise RuntimeError(f"{len(found)} of {len(names)} samples ended")
        return [len(found[name].generated_tokens) for name in names]

    def rest(self) -> None:
        self.open.close()

    def release(self) -> None:
        self.rest()
        self.work.model.destroy_cached_continuous_batching_manager()
