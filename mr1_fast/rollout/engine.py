"""The rollout: G completions of each prompt, with continuous batching.

Read this file first, then schedule.py.

A prompt and its images are encoded once, into a span of the pool of keys and values that all its
samples read (prefill.py, cache.py). Samples wait in order, and where one ends, the next takes its
place in the same step. Who runs and when it ends is decided on the host (schedule.py); the device
sees tables of integers (table.py, decoder.py, graphs.py).

A sample's randomness is a row of numbers that belongs to it alone, so what is drawn does not depend
on what runs beside it.
"""

from collections import deque
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import numpy as np
import torch
from torch import nn

from ..errors import UserError
from ..kernels.dispatch import use_triton
from ..model.attention import use_packed_attention
from ..model.forward import LayerRun, base_model
from ..model.processor import ImageTextProcessor
from ..model.prompt import PromptEncoder
from ..types import Example, Prompt, Rollout
from .cache import Layout, Pool, token_bytes
from .decoder import Decoder, Wait, decoder_layers, describe_layers
from .graphs import Graphs
from .prefill import prefill
from .sampling import Sampling
from .schedule import Ends, Schedule
from .stop import StopTexts
from .table import MOST_SAMPLES

FREE_SHARE = 0.7
"""Share of a GPU's free memory that keys and values take unless the caller says how much."""
PREFILL_TOKENS = 8192
"""Prompt tokens encoded at once; a longer prompt goes alone."""


class Engine:
    """Samples from a `…ForConditionalGeneration` of the Qwen2-VL family, with its current weights.

    The pool and the captured graphs are kept between calls; `release()` frees their memory. Call
    it, too, after changing what the model computes by other means than its weights' values: a graph
    computes what it was captured with.

    encode: makes prompts of examples; by default, one that limits neither prompts nor images.
    layers: how layers are computed where prompts are encoded.

    >>> engine = Engine(model, processor)  # doctest: +SKIP
    >>> engine.generate(examples, 8, Sampling(max_new_tokens=256)).texts  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module,
        processor: ImageTextProcessor,
        encode: PromptEncoder | None = None,
        layers: LayerRun | None = None,
    ):
        self.model, self.processor, self.layers = model, processor, layers
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
        """Sample G = `num_generations` completions of each example.

        prompts: the examples as `encode` gives them, where the caller has them already.
        cache_tokens: most tokens that have keys and values at once; samples wait where there is no
        room. None means as many as are of use, on a GPU as fit into FREE_SHARE of its free memory.
        prefill_tokens: most prompt tokens that are encoded at once.

        The same seed gives the same samples. What runs beside a sample changes its numbers by
        rounding alone.

        Raises UserError where a prompt with a completion is longer than the cache, where logits are
        NaN, and for settings of sampling that mean nothing.
        """
        sampling = sampling or Sampling()
        sampling.check_sampling()
        prompts = self.encode.many(examples) if prompts is None else prompts
        if num_generations < 0:
            raise UserError(f"num_generations is {num_generations}, but must not be negative.")

        count = len(prompts) * num_generations
        if count and sampling.max_new_tokens:
            schedule = self._sample(
                prompts, num_generations, sampling, seed, cache_tokens, prefill_tokens
            )
            completions, logprobs = schedule.completions(), schedule.completion_logprobs()
            reasons = schedule.reasons
        else:
            completions, logprobs, reasons = [[]] * count, [[]] * count, ["length"] * count

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
        """Free the memory of keys, values and graphs."""
        self._decoder, self._graphs, self._key = None, None, ()

    # --- sampling -------------------------------------------------------------------------------

    def _sample(
        self,
        prompts: list[Prompt],
        num_generations: int,
        sampling: Sampling,
        seed: int,
        cache_tokens: int | None,
        prefill_tokens: int,
    ) -> Schedule:
        """Sample all completions; returns the schedule with its results."""
        with torch.no_grad(), evaluating(self.model), on_device(self._text.norm.weight.device):
            layout = self._layout(prompts, num_generations, sampling, cache_tokens)
            self._prepare(layout, sampling)
            schedule = self._schedule(prompts, num_generations, layout, sampling, seed)
            self._run(schedule, prompts, prefill_tokens)
        return schedule

    def _run(self, schedule: Schedule, prompts: list[Prompt], prefill_tokens: int) -> None:
        """Encode prompts and launch steps until every sample has ended."""
        device = self._graphs or self._decoder
        launched: deque[tuple[np.ndarray, Wait]] = deque()
        while True:
            if chosen := schedule.next_prompts(prefill_tokens):
                self._begin(schedule, chosen, prompts)
                continue

            step = schedule.next_step()
            for sample in step.new:
                prompt = prompts[sample // schedule.num_generations]
                self._decoder.reset_seen(int(schedule.span_of_sample[sample]), prompt.input_ids)
            if len(step.samples):
                wait = device.launch(step.table, step.uniform)
                launched.append((step.samples, wait))

            if not launched:
                return
            if len(launched) > device.ahead or not len(step.samples):
                samples, wait = launched.popleft()
                schedule.record(samples, *wait())

    def _begin(self, schedule: Schedule, chosen: list[int], prompts: list[Prompt]) -> None:
        """Encode the chosen prompts, and draw the first tokens of their samples."""
        encoded = [prompts[i] for i in chosen]
        starts = schedule.layout.prompt_start(schedule.span_of_prompt[chosen]).tolist()
        hidden = prefill(self.model, encoded, self._decoder.pool, starts, self.layers)

        samples = schedule.samples_of(chosen)
        uniform = torch.from_numpy(schedule.uniform[samples, 0])
        ids = [prompt.input_ids for prompt in encoded]
        tokens, logprobs = self._decoder.first(hidden, ids, uniform)
        schedule.begin(samples, tokens.cpu().numpy(), logprobs.cpu().numpy())

    # --- preparation ----------------------------------------------------------------------------

    @property
    def _text(self) -> nn.Module:
        """The language model, without vision and LM head."""
        return base_model(self.model).model.language_model

    def _layout(
        self, prompts: list[Prompt], num_generations: int, sampling: Sampling, budget: int | None
    ) -> Layout:
        """Choose how to cut the pool: as the last one if that is enough, since graphs hold it."""
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

    def _prepare(self, layout: Layout, sampling: Sampling) -> None:
        """Make a decoder with its pool, and its graphs on a GPU.

        The last ones are used again while nothing that a captured graph holds has changed.
        """
        use_packed_attention(base_model(self.model))  # another library may have set its own
        pointers = [parameter.data_ptr() for parameter in self.model.parameters()]
        layers = decoder_layers(self.model)
        ways = [each.key for layer in layers for each in layer.projections.values()]
        key = (layout, str(vars(sampling)), pointers, ways)
        if self._key == key:
            self._decoder.layers = layers  # on a CPU, they hold copies of adapters
            return

        self.release()
        pool = Pool(self._text, layout)
        self._decoder = Decoder(self.model, layers, pool, sampling, layout.sample_spans)
        self._key = key
        # A graph cannot hold attention in PyTorch, which reads lengths on the host.
        if pool.keys.is_cuda and use_triton(pool.keys):
            self._graphs = Graphs(self._decoder, layout.sample_spans)

    def _schedule(
        self,
        prompts: list[Prompt],
        num_generations: int,
        layout: Layout,
        sampling: Sampling,
        seed: int,
    ) -> Schedule:
        """Make the schedule of a call, with all of its random numbers."""
        shape = len(prompts) * num_generations, sampling.max_new_tokens
        uniform = torch.rand(shape, generator=torch.Generator().manual_seed(seed)).numpy()
        lengths = [len(prompt.input_ids) for prompt in prompts]
        positions = [prompt.next_position for prompt in prompts]
        return Schedule(lengths, positions, num_generations, layout, uniform, self._ends(sampling))

    def _ends(self, sampling: Sampling) -> Ends:
        """Make the function that tells why a completion ends: at "eos" or at a "stop" text."""
        tokenizer = self.processor.tokenizer
        stop = StopTexts(tokenizer, sampling.stop)
        # Qwen2-VL ends an answer with <|im_end|>, the tokenizer's, and rarely with <|endoftext|>.
        configured = base_model(self.model).generation_config.eos_token_id
        configured = configured if isinstance(configured, list) else [configured]
        eos = {tokenizer.eos_token_id, *configured}

        def ends(sample: int, tokens: np.ndarray) -> str | None:
            if int(tokens[-1]) in eos:
                return "eos"
            if stop.ends(tokens):
                return "stop"
            return None

        return ends


def fitting(
    prompts: list[Prompt], num_generations: int, sampling: Sampling, budget: int | None = None
) -> Layout:
    """Lay out a pool for the prompts' samples, or for as many at once as `budget` tokens hold.

    Raises UserError where not even one prompt with one sample fits.
    """
    lengths = [len(prompt.input_ids) for prompt in prompts]
    return Layout.fitting(lengths, num_generations, sampling.max_new_tokens, MOST_SAMPLES, budget)


def describe_decoding(model: nn.Module) -> str:
    """Say in one line how a rollout of this model computes attention and each linear layer."""
    with evaluating(model):
        return describe_layers(decoder_layers(model), base_model(model).lm_head.weight)


def on_device(device: torch.device) -> AbstractContextManager:
    """Make a GPU the current one, whose streams and events are used; do nothing for a CPU."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Put the model into evaluation, without dropout, and back afterwards."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
