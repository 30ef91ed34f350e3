"""The rollout: G completions of each prompt, with continuous batching.

Read this file first, then stream.py and schedule.py.

A prompt and its images are encoded once, into a span of the pool of keys and values that all its
samples read (prefill.py, cache.py). Samples wait in order, and where one ends, the next takes its
place in the same step: a sample of the next batch, too (stream.py). Who runs and when it ends is
decided on the host (schedule.py); the device sees tables of integers (table.py, decoder.py,
graphs.py).

A sample's randomness is a row of numbers that belongs to it alone, so what is drawn does not depend
on what runs beside it.
"""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial

import numpy as np
import torch
from torch import nn

from ..errors import UserError
from ..kernels.dispatch import use_triton
from ..model.attention import use_packed_attention
from ..model.families import base_model, text_model
from ..model.forward import LayerRun
from ..model.processor import Processor
from ..model.prompt import PromptEncoder
from ..types import Example, Prompt, Rollout
from .cache import Layout, Pool, token_bytes
from .decoder import Decoder, decoder_layers, describe_layers
from .graphs import Graphs
from .prefill import prefill
from .sampling import Sampling
from .schedule import Ends, Results, Schedule
from .stop import StopTexts
from .stream import Batch, Means, Stream
from .table import MOST_SAMPLES

FREE_SHARE = 0.7
"""Share of a GPU's free memory that keys and values take unless the caller says how much."""
PREFILL_TOKENS = 8192
"""Prompt tokens encoded at once; a longer prompt goes alone."""


class Engine:
    """Samples from a model of any family, or from PEFT's around it, with its current weights.

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
        processor: Processor,
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
        self._busy = False
        """Whether a stream has begun and not ended."""

    def generate(
        self,
        examples: list[Example],
        num_generations: int = 1,
        sampling: Sampling | None = None,
        seed: int = 0,
        prompts: list[Prompt] | None = None,
        cache_tokens: int | None = None,
        prefill_tokens: int = PREFILL_TOKENS,
        places: Sequence[int] | None = None,
    ) -> Rollout:
        """Sample G = `num_generations` completions of each example.

        prompts: the examples as `encode` gives them, where the caller has them already.
        cache_tokens: most tokens that have keys and values at once; samples wait where there is no
        room. None means as many as are of use, on a GPU as fit into FREE_SHARE of its free memory.
        prefill_tokens: most prompt tokens that are encoded at once.
        places: the examples' numbers in a larger batch whose samples these are (`Batch.places`).

        The same seed gives the same samples. What runs beside a sample changes its numbers by
        rounding alone.

        Raises UserError where a prompt with a completion is longer than the cache, where logits are
        NaN, and for settings of sampling that mean nothing.
        """

        def batch() -> Iterator[Batch]:  # with its prompts, so that these keep their pixels
            encoded = self.encode.many(examples) if prompts is None else prompts
            yield Batch(examples, seed, encoded, places)

        (rollout,) = self.stream(batch(), num_generations, sampling, cache_tokens, prefill_tokens)
        return rollout

    def stream(
        self,
        batches: Iterable[Batch],
        num_generations: int = 1,
        sampling: Sampling | None = None,
        cache_tokens: int | None = None,
        prefill_tokens: int = PREFILL_TOKENS,
    ) -> Iterator[Rollout]:
        """Sample batches without a gap: the first samples of one run beside the last of another.

        Yields a rollout for each batch, in order, as soon as its samples have ended; `generate`
        gives the same samples. A batch is taken and encoded when there is room for its samples. A
        rollout's prompts come without their pixels, unless the batch came with prompts.

        The model may be used between rollouts, but it must not be changed before the last one: the
        samples that are on their way go on from keys and values of its present weights. The engine
        itself is busy until then, or until the iterator is closed.

        Raises UserError as `generate` does, after the rollouts of the batches before.
        """
        sampling = sampling or Sampling()
        sampling.check_sampling()
        if num_generations < 0:
            raise UserError(f"num_generations is {num_generations}, but must not be negative.")

        def lay_out(lengths: list[int], more: bool) -> tuple[Decoder, Decoder | Graphs]:
            self._prepare(
                self._layout(lengths, num_generations, sampling, cache_tokens, more), sampling
            )
            return self._decoder, self._graphs or self._decoder

        means = Means(self.encode, lay_out, partial(prefill, self.model, layers=self.layers))
        schedule = Schedule(num_generations, sampling.max_new_tokens, self._ends(sampling))
        return self._rollouts(Stream(batches, schedule, prefill_tokens, means))

    def release(self) -> None:
        """Free the memory of keys, values and graphs."""
        self._decoder, self._graphs, self._key = None, None, ()

    # --- sampling -------------------------------------------------------------------------------

    def _rollouts(self, stream: Stream) -> Iterator[Rollout]:
        """Yield the rollouts of a stream; the model is as the caller has it in between."""
        if self._busy:
            raise RuntimeError(
                "the engine samples for another stream: read that to its end, or close it"
            )
        self._busy = True
        try:
            while True:
                with self._working():
                    ended = stream.next()
                    rollout = ended and self._rollout(stream.schedule.num_generations, *ended)
                if rollout is None:
                    return
                yield rollout
        finally:
            self._busy = False
            stream.close()

    def _rollout(
        self, num_generations: int, batch: Batch, prompts: list[Prompt], results: Results
    ) -> Rollout:
        """Make the rollout of a batch that has ended."""
        ids = results.completions
        # Of nothing, the tokenizer would make one empty text.
        decode = self.processor.tokenizer.batch_decode
        texts = decode(ids, skip_special_tokens=True) if ids else []
        openings = [prompt.opening for prompt in prompts for _ in range(num_generations)]
        return Rollout(
            examples=batch.examples,
            prompts=prompts,
            completions=[torch.tensor(each, dtype=torch.int64) for each in ids],
            texts=[opening + text for opening, text in zip(openings, texts, strict=True)],
            logprobs=[torch.tensor(each, dtype=torch.float32) for each in results.logprobs],
            reasons=results.reasons,
            num_generations=num_generations,
        )

    @contextmanager
    def _working(self) -> Iterator[None]:
        """Set the model and PyTorch up for sampling, and back afterwards."""
        device = self._text.norm.weight.device
        with torch.no_grad(), evaluating(self.model), on_device(device):
            use_packed_attention(base_model(self.model))  # another library may have set its own
            yield

    # --- preparation ----------------------------------------------------------------------------

    @property
    def _text(self) -> nn.Module:
        """The language model, without vision and LM head."""
        return text_model(self.model)

    def _layout(
        self,
        lengths: list[int],
        num_generations: int,
        sampling: Sampling,
        budget: int | None,
        more: bool,
    ) -> Layout:
        """Choose how to cut the pool: as the last one if that is enough, since graphs hold it."""
        fit = partial(
            Layout.fitting, lengths, num_generations, sampling.max_new_tokens, MOST_SAMPLES
        )
        wanted = fit(budget, more)
        last = self._decoder.pool.layout if self._decoder else None
        if last and last.covers(wanted) and (budget is None or last.tokens <= budget):
            return last

        device = self._text.norm.weight.device
        if budget is not None or device.type != "cuda":
            return wanted

        self.release()
        torch.cuda.empty_cache()
        free = FREE_SHARE * torch.cuda.mem_get_info(device)[0]
        return fit(int(free / token_bytes(self._text)), more)

    def _prepare(self, layout: Layout, sampling: Sampling) -> None:
        """Make a decoder with its pool, and its graphs on a GPU.

        The last ones are used again while nothing that a captured graph holds has changed.
        """
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
        # A graph cannot hold attention in PyTorch, which reads lengths on the host.
        if pool.keys.is_cuda and use_triton(pool.keys):
            self._graphs = Graphs(self._decoder, layout.sample_spans)
        self._key = key

    def _ends(self, sampling: Sampling) -> Ends:
        """Make the function that tells why a completion ends: at "eos" or at a "stop" text."""
        tokenizer = self.processor.tokenizer
        stop = StopTexts(tokenizer, sampling.stop)
        # Qwen ends an answer with <|im_end|>, the tokenizer's, and rarely with <|endoftext|>. A
        # model may name its ends in a configuration for generating, or not.
        generation = getattr(base_model(self.model), "generation_config", None)
        configured = getattr(generation, "eos_token_id", None)
        configured = configured if isinstance(configured, list) else [configured]
        eos = {tokenizer.eos_token_id, *configured}

        def ends(sample: int, tokens: np.ndarray) -> str | None:
            if tokens.item(-1) in eos:
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
