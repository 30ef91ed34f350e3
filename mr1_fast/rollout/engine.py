"""The rollout: G completions of each prompt, with continuous batching. Read this file first, then schedule.py.

A prompt and its images are encoded once, into a span of the pool of keys and values that all its samples read
(prefill.py, cache.py). Samples wait in order; one that ends gives its place to the next in the same step. Who runs, and
when it ends, is decided on the host (schedule.py); the device sees tables (decoder.py).

A sample's randomness is a row of numbers that belongs to it alone, so what is drawn does not depend on what runs beside
it.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext

import numpy as np
import torch
from torch import nn

from ..errors import UserError
from ..kernels.dispatch import use_triton
from ..model.attention import use_packed_attention
from ..model.forward import base_model
from ..model.processor import ImageTextProcessor
from ..model.prompt import PromptEncoder
from ..types import Example, Prompt, Rollout
from .cache import Layout, Pool, token_bytes
from .decoder import SIZES, Decoder, Graphs
from .prefill import prefill
from .sampling import Sampling
from .schedule import Ends, Schedule
from .stop import StopTexts

MOST_SAMPLES = SIZES[-1]
"""Samples decoded at once, where memory allows."""
FREE_SHARE = 0.7
"""Of a GPU's free memory, what keys and values take unless told otherwise."""
PREFILL_TOKENS = 8192
"""Prompt tokens encoded at once; a longer prompt goes alone."""


class Engine:
    """Samples from a `…ForConditionalGeneration` of the Qwen2-VL family, with the weights it has at the time.

    The pool and the captured graphs are kept between calls; `release()` gives their memory back. Call it, too, after
    changing what the model computes by other means than its weights' values: a graph holds what it was captured with.

    >>> Engine(model, processor).generate(examples, 8, Sampling(max_new_tokens=256)).texts  # doctest: +SKIP
    """

    def __init__(
        self, model: nn.Module, processor: ImageTextProcessor, encode: PromptEncoder | None = None
    ):
        self.model, self.processor = model, processor
        self.encode = encode or PromptEncoder(
            model, processor, max_prompt_tokens=2**31, max_pixels=2**31
        )
        self._decoder: Decoder | None = None
        self._graphs: Graphs | None = None
        self._key: tuple = ()

    def generate(
        self,
        examples: list[Example],
        num_generations: int = 1,
        sampling: Sampling | None = None,
        seed: int = 0,
        prompts: list[Prompt] | None = None,
        cache_tokens: int | None = None,
        prefill_tokens: int = PREFILL_TOKENS,
    ) -> Rollout:
        """G = `num_generations` completions of each example; `prompts` are the examples as `encode` gives them.

        At most `cache_tokens` tokens have keys and values at once, and samples wait for room (default: as many as are
        of use, on a GPU as fit into FREE_SHARE of its free memory). UserError where a prompt with a completion is
        longer than that, and where logits are NaN. The same seed gives the same samples; what runs beside one changes
        its numbers by rounding alone.
        """
        sampling = sampling or Sampling()
        sampling.check_sampling()
        prompts = self.encode.many(examples) if prompts is None else prompts
        if num_generations < 0:
            raise UserError(f"num_generations is {num_generations}, but must not be negative.")
        count = len(prompts) * num_generations
        completions, logprobs, reasons = [[]] * count, [[]] * count, ["length"] * count
        if count and sampling.max_new_tokens:
            with torch.no_grad(), evaluating(self.model), on_device(self._text.norm.weight.device):
                layout = self._layout(prompts, num_generations, sampling, cache_tokens)
                schedule = self._schedule(prompts, num_generations, layout, sampling, seed)
                self._prepare(layout, sampling)
                self._run(schedule, prompts, prefill_tokens)
            completions = [ids[:n] for ids, n in zip(schedule.tokens, schedule.counts, strict=True)]
            logprobs = [
                values[:n] for values, n in zip(schedule.logprobs, schedule.counts, strict=True)
            ]
            reasons = schedule.reasons
        return Rollout(
            examples=examples,
            prompts=prompts,
            completions=[torch.tensor(ids, dtype=torch.int64) for ids in completions],
            texts=self.processor.tokenizer.batch_decode(completions, skip_special_tokens=True),
            logprobs=[torch.tensor(values, dtype=torch.float32) for values in logprobs],
            reasons=reasons,
            num_generations=num_generations,
        )

    def release(self) -> None:
        """Free the keys, values and graphs."""
        self._decoder, self._graphs, self._key = None, None, ()

    def _schedule(
        self, prompts, num_generations, layout: Layout, sampling: Sampling, seed: int
    ) -> Schedule:
        shape = len(prompts) * num_generations, sampling.max_new_tokens
        uniform = torch.rand(shape, generator=torch.Generator().manual_seed(seed)).numpy()
        lengths, positions = [len(p.input_ids) for p in prompts], [p.next_position for p in prompts]
        return Schedule(lengths, positions, num_generations, layout, uniform, self._ends(sampling))

    def _ends(self, sampling: Sampling) -> Ends:
        tokenizer, stop = (
            self.processor.tokenizer,
            StopTexts(self.processor.tokenizer, sampling.stop),
        )
        # Qwen2-VL ends an answer with <|im_end|>, the tokenizer's, and rarely with <|endoftext|>.
        configured = base_model(self.model).generation_config.eos_token_id
        eos = {
            tokenizer.eos_token_id,
            *(configured if isinstance(configured, list) else [configured]),
        }

        def ends(sample: int, tokens: np.ndarray) -> str | None:
            return "eos" if int(tokens[-1]) in eos else "stop" if stop.ends(tokens) else None

        return ends

    def _layout(
        self, prompts: list[Prompt], num_generations: int, sampling: Sampling, budget: int | None
    ) -> Layout:
        """How to cut the pool: the last one again where it will do, as graphs hold on to it."""
        wanted = fitting(prompts, num_generations, sampling, budget)
        last = self._decoder.pool.layout if self._decoder else None
        if last and last.covers(wanted) and (budget is None or last.tokens <= budget):
            return last
        device = self._text.norm.weight.device
        if budget is not None or device.type != "cuda":
            return wanted
        self.release()
        torch.cuda.empty_cache()
        free = FREE_SHARE * torch.cuda.mem_get_info(device)[0]
        return fitting(prompts, num_generations, sampling, int(free / token_bytes(self._text)))

    @property
    def _text(self) -> nn.Module:
        return base_model(self.model).model.language_model

    def _prepare(self, layout: Layout, sampling: Sampling) -> None:
        """A decoder with its pool; the last one again while nothing that a captured graph holds on to has changed."""
        use_packed_attention(base_model(self.model))  # another library may have set its own
        pointers = [parameter.data_ptr() for parameter in self.model.parameters()]
        key = (layout, str(vars(sampling)), pointers)
        if self._key != key:
            self.release()
            pool = Pool(self._text, layout)
            self._decoder, self._key = Decoder(self.model, pool, sampling, layout.sample_spans), key
            if pool.keys.is_cuda and use_triton(
                pool.keys
            ):  # PyTorch's own form of a step reads lengths on the host
                self._graphs = Graphs(self._decoder, layout.sample_spans)

    def _run(self, schedule: Schedule, prompts: list[Prompt], prefill_tokens: int) -> None:
        """Until every sample has ended."""
        decoder, device = self._decoder, self._graphs or self._decoder
        pending: deque = deque()
        while True:
            if chosen := schedule.next_prompts(prefill_tokens):
                self._begin(schedule, chosen, prompts, decoder)
                continue
            samples, new, table, uniform = schedule.next_step()
            for sample in new if decoder.seen is not None else ():
                decoder.forget(
                    int(schedule.sample_spans[sample]), prompts[sample // schedule.group].input_ids
                )
            if len(samples):
                pending.append((samples, device.launch(table, uniform)))
            elif not pending:
                return
            if len(pending) > device.ahead or not len(samples):
                samples, wait = pending.popleft()
                schedule.record(samples, *wait())

    def _begin(
        self, schedule: Schedule, chosen: list[int], prompts: list[Prompt], decoder: Decoder
    ) -> None:
        """Encode prompts and draw their samples' first tokens."""
        starts = schedule.layout.prompt_start(schedule.prompt_spans[chosen]).tolist()
        hidden = prefill(self.model, [prompts[i] for i in chosen], decoder.pool, starts)
        samples = schedule.samples_of(chosen)
        tokens, logprobs = decoder.first(
            hidden,
            [prompts[i].input_ids for i in chosen],
            torch.from_numpy(schedule.uniform[samples, 0]),
        )
        schedule.begin(samples, tokens.cpu().numpy(), logprobs.cpu().numpy())


def fitting(
    prompts: list[Prompt], num_generations: int, sampling: Sampling, budget: int | None = None
) -> Layout:
    """Room for the prompts' samples, or for as many at once as `budget` tokens hold."""
    lengths = [len(prompt.input_ids) for prompt in prompts]
    return Layout.fitting(lengths, num_generations, sampling.max_new_tokens, MOST_SAMPLES, budget)


def on_device(device: torch.device):
    """Streams and events are those of a GPU that need not be the first."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Without dropout and checkpointing; afterwards the whole model is in training, or not, as it was."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
