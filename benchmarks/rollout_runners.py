"""What bench_rollout.py measures: prompts with prescribed lengths, and who samples completions of them.

A runner is built from a `Work`. Called with a length for each sample, it returns how many tokens they got.
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
"""Tokens of a completion of the tail: the log-normal's median, its logarithm's deviation, and where it is clipped."""
PATIENCE = 40.0
"""Seconds that continuous batching may take."""
PAGE = 256
"""Tokens of a block of its cache, as it comes."""


@dataclass
class Work:
    """A model, B prompts, and how many tokens each of their B·G samples has."""

    model: nn.Module
    processor: ImageTextProcessor
    examples: list[Example]
    prompts: list[Prompt]
    lengths: list[int]
    most_warm: int
    """Tokens of the baselines' first samples."""

    @classmethod
    def of(
        cls,
        model: nn.Module,
        processor,
        examples: list[Example],
        lengths: list[int],
        most_warm: int,
    ) -> "Work":
        encode = PromptEncoder(model, processor, max_prompt_tokens=2**31, max_pixels=2**31)
        return cls(
            model.eval(), processor, examples, [encode(e) for e in examples], lengths, most_warm
        )

    @property
    def device(self) -> torch.device:
        return base_model(self.model).lm_head.weight.device

    def least_bytes(self) -> int:
        """What steps that all unfinished samples take together must read, after the first tokens."""
        base = base_model(self.model)
        text = base.model.language_model
        weights = sum(
            x.nbytes for x in (*text.layers.parameters(), text.norm.weight, base.lm_head.weight)
        )
        longest = (
            np.array(self.lengths).reshape(-1, GROUP).max(axis=1)
        )  # a prompt is read while its group runs
        prompts = sum(
            len(p.input_ids) * (int(n) - 1) for p, n in zip(self.prompts, longest, strict=True)
        )
        own = sum(n * (n - 1) // 2 for n in self.lengths)
        return (max(self.lengths) - 1) * weights + token_bytes(text) * (prompts + own)


def tail_work(quick: bool, device: str) -> Work:
    """Part `tail`: few long completions among many short ones."""
    prompts, median, most = (2, 6, 16) if quick else (16, MEDIAN, MOST)
    processor = tiny_processor()
    torch.manual_seed(0)
    model = tiny_model(processor).to(device)
    examples = load_examples("counting", "drawn", "train", 0, 1).all(prompts)
    drawn = np.random.default_rng(0).lognormal(math.log(median), SIGMA, prompts * GROUP)
    return Work.of(
        model, processor, examples, drawn.round().clip(1, most).astype(int).tolist(), most
    )


def long_work(quick: bool, device: str) -> Work:
    """Parts `long` and `lora`; the tiny model for --quick."""
    prompts, tokens, size = (2, 8, (84, 84)) if quick else (8, 512, IMAGE_SIZE)
    processor = tiny_processor()
    torch.manual_seed(0)
    model = tiny_model(processor).to(device) if quick else random_2b(processor, device)
    noise = np.random.default_rng(0).integers(
        0, 256, (prompts, size[1], size[0], 3), dtype=np.uint8
    )
    problem = "How many different items are there in the image?"
    examples = [Example(problem, (Image.fromarray(pixels),), "3") for pixels in noise]
    return Work.of(model, processor, examples, [tokens] * prompts * GROUP, most_warm=8)


def random_2b(processor: ImageTextProcessor, device: str) -> nn.Module:
    """A model of Qwen2-VL-2B's shape in bf16 for the tiny model's processor."""
    config = find_model_config("Qwen/Qwen2-VL-2B-Instruct")
    tokens = {
        "image": "image_pad",
        "video": "video_pad",
        "vision_start": "vision_start",
        "vision_end": "vision_end",
    }
    for name, token in tokens.items():
        setattr(
            config, f"{name}_token_id", processor.tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        )
    with torch.device(device):
        return AutoModelForImageTextToText.from_config(config, dtype=torch.bfloat16)


# --- who does it --------------------------------------------------------------------------------------------------


class Runner:
    """Not timed: `prepare` before a call, `rest` before another's. `release` frees what is kept between calls."""

    def __init__(self, work: Work):
        self.work = work

    def __call__(self, lengths: list[int]) -> list[int]:
        """Samples of `lengths` tokens; how many they got."""
        raise NotImplementedError

    def prepare(self) -> None:
        pass

    def rest(self) -> None:
        pass

    def release(self) -> None:
        pass


class Prescribed(Engine):
    """Ends each sample at its prescribed length and nowhere else."""

    lengths: list[int]

    def _ends(self, *arguments):
        return lambda sample, tokens: "length" if len(tokens) == self.lengths[sample] else None


class WithoutGraphs(Prescribed):
    """Ours, but for the graphs: a step's kernels are launched one by one, and the host waits for each step."""

    def _prepare(self, *arguments) -> None:
        super()._prepare(*arguments)
        self._graphs = None


class Ours(Runner):
    """The engine, of `kind`."""

    def __init__(self, work: Work, kind: type[Prescribed] = Prescribed):
        super().__init__(work)
        self.engine, self.sampling = (
            kind(work.model, work.processor),
            Sampling(max_new_tokens=max(work.lengths)),
        )

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
    """Temperature 1, no filters, no EOS."""
    pad = work.processor.tokenizer.pad_token_id
    return GenerationConfig(
        do_sample=True, temperature=1.0, top_k=0, top_p=1.0, pad_token_id=pad, **settings
    )


class RowsEnd(StoppingCriteria):
    """A row ends at its length in all; `generate` pads it from then on, as it does after an EOS."""

    eos_token_id = None  # criteria with such an attribute are what makes it pad

    def __init__(self, ends: Tensor):
        self.ends = ends

    def __call__(self, input_ids: Tensor, scores, **kwargs) -> Tensor:
        return self.ends <= input_ids.shape[1]


class Generate(Runner):
    """transformers' `generate` with `num_return_sequences`."""

    def __init__(self, work: Work):
        super().__init__(work)
        work.model.generation_config = plain_sampling(
            work
        )  # fills in what a call leaves open, an EOS too
        self.pad = work.processor.tokenizer.pad_token_id
        ids = [prompt.input_ids for prompt in work.prompts]
        inputs = {
            "input_ids": pad_sequence(
                ids, batch_first=True, padding_value=self.pad, padding_side="left"
            ),
            "attention_mask": pad_sequence(
                [torch.ones_like(x) for x in ids], batch_first=True, padding_side="left"
            ),
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
        inside = torch.arange(ids.shape[1], device=ids.device) < ends[:, None]
        return (
            (inside | (ids != self.pad)).sum(1) - start
        ).tolist()  # behind the end is nothing but padding


class ContinuousBatching(Runner):
    """transformers' continuous batching, with room for all samples at once and a manager that is kept."""

    def __init__(self, work: Work):
        super().__init__(work)
        self.ids = [prompt.input_ids.tolist() for prompt in work.prompts for _ in range(GROUP)]
        pages = sum(-(-(len(x) + n) // PAGE) for x, n in zip(self.ids, work.lengths, strict=True))
        settings = dict(
            num_blocks=pages + pages // 2, max_batch_tokens=max(512, sum(map(len, self.ids)) // 16)
        )
        self.attention = "flash_attention_2" if is_flash_attn_2_available() else "paged|sdpa"
        if "auto_switch_to_flash" in {
            field.name for field in fields(ContinuousBatchingConfig)
        }:  # after 5.17
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
            if (
                result is None and not self.manager.is_running()
            ) or time.perf_counter() > start + PATIENCE:
                raise RuntimeError(f"{len(found)} of {len(names)} samples ended")
        return [len(found[name].generated_tokens) for name in names]

    def rest(self) -> None:
        self.open.close()

    def release(self) -> None:
        self.rest()
        self.work.model.destroy_cached_continuous_batching_manager()
