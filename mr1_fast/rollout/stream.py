"""Batches that are sampled one after the other, without a gap between them.

The next batch is encoded when sample spans of the pool would stay free without it, so that its
first samples run beside the last ones of the batches before. Batches come out in order. In memory
are those that have not come out, about two unless a sample is far longer than the others; only one
of them has prompts that are not in the pool yet, and thus pixels.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import replace
from itertools import chain, repeat
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..errors import UserError
from ..model.prompt import PromptEncoder
from ..types import Example, Prompt
from .cache import Layout, Pool
from .decoder import Decoder, Wait
from .graphs import Graphs
from .schedule import Group, Results, Schedule, Step
from .table import MOST_SAMPLES


class Batch(NamedTuple):
    """Examples whose completions are sampled with one seed."""

    examples: list[Example]
    seed: int = 0
    prompts: list[Prompt] | None = None
    """The examples as `encode` gives them, where the caller has them already."""
    places: Sequence[int] | None = None
    """The examples' numbers in a larger batch of which they are a part: they are then given the
    random numbers that they would have there. None: the batch is whole."""
    seeds: Sequence[int] | None = None
    """The seed of each example's larger batch, where they are parts of several, one behind the
    other. None: all have `seed`."""


def random_numbers(batch: Batch, count: int, num_generations: int, max_new_tokens: int) -> Tensor:
    """Draw the random numbers (B·G, M) of a batch of B = `count` prompts: M = `max_new_tokens` for
    each sample."""

    def drawn(seed: int, groups: int) -> Tensor:
        generator = torch.Generator().manual_seed(seed)
        of_all = torch.rand((groups * num_generations, max_new_tokens), generator=generator)
        return of_all.view(groups, num_generations, max_new_tokens)

    if batch.places is None:
        return drawn(batch.seed, count).flatten(0, 1)
    places: dict[int, list[int]] = {}
    for seed, place in zip(batch.seeds or repeat(batch.seed), batch.places, strict=False):
        places.setdefault(seed, []).append(place)
    parts = [drawn(seed, max(of_seed) + 1)[of_seed] for seed, of_seed in places.items()]
    parts.append(torch.zeros(0, num_generations, max_new_tokens))  # there may be no example
    return torch.cat(parts).flatten(0, 1)


class Means(NamedTuple):
    """What an engine gives a stream to work with."""

    encode: PromptEncoder
    """Makes prompts of examples."""
    lay_out: Callable[[list[int], bool], tuple[Decoder, Decoder | Graphs]]
    """lay_out(lengths of prompts, whether others follow) → a decoder with a pool for them, and what
    launches steps."""
    prefill: Callable[[list[Prompt], Pool, list[int]], Tensor]
    """Encodes prompts into a pool: `prefill` of prefill.py, with a model."""


class Stream:
    """Samples batches in order; `next` works until the oldest batch has ended.

    A prompt that the stream has encoded loses its pixels, by far the most of its bytes, as soon as
    its keys and values are in the pool.
    """

    def __init__(
        self, batches: Iterable[Batch], schedule: Schedule, prefill_tokens: int, means: Means
    ):
        self.batches: Iterator[Batch] = iter(batches)
        self.schedule, self.prefill_tokens, self.means = schedule, prefill_tokens, means
        self.decoder: Decoder | None = None
        self.launcher: Decoder | Graphs | None = None
        self.launched: deque[tuple[Step, Wait]] = deque()

        self.held: deque[tuple[Batch, range]] = deque()
        """Batches of the schedule, with the numbers of their prompts."""
        self.prompts: dict[int, Prompt] = {}
        """The prompts of those batches by number."""
        self.coming: tuple[Batch, list[Prompt]] | None = None
        """The next batch and its prompts, which wait for a larger pool."""
        self.longest = self.most = self.expected = 0
        """Tokens of the longest prompt, prompts of the largest batch, and samples of that batch for
        which the pool was laid out."""
        self.error: UserError | None = None
        """Why the next batch cannot be encoded."""

    def next(self) -> tuple[Batch, list[Prompt], Results] | None:
        """Work until the oldest batch has ended, and take it out; None if there is no batch left.

        Raises UserError where a batch cannot be encoded or does not fit the cache, once all batches
        before it were taken out, and where logits are NaN.
        """
        while True:
            if results := self.schedule.take():
                batch, numbers = self.held.popleft()
                prompts = [self.prompts.pop(number) for number in numbers]
                return batch, prompts if batch.prompts is None else batch.prompts, results
            if self._add_batch():
                continue
            if groups := self.schedule.next_prompts(self.prefill_tokens):
                self._begin(groups)
            elif not self._step():
                break
        if self.error:
            raise self.error
        return None

    def close(self) -> None:
        """Wait for steps that the device has not finished, since it reads their inputs."""
        while self.launched:
            _, wait = self.launched.popleft()
            wait()

    # --- batches --------------------------------------------------------------------------------

    def _add_batch(self) -> bool:
        """Add the next batch if spans would stay free without it; tell whether one was added."""
        schedule = self.schedule
        if self.error or not schedule.wants_prompts:
            return False
        self.coming = self.coming or self._encoded()
        if self.coming is None:
            return False

        batch, prompts = self.coming
        lengths = [len(prompt.input_ids) for prompt in prompts]
        count = len(prompts) * schedule.num_generations
        if count and schedule.max_new_tokens and self._outgrows(lengths):
            # Another pool needs the memory of this one, so running samples end first. This happens
            # a few times: among n batches, about ln(n) have a longer prompt than all before.
            if not schedule.idle or self.launched:
                return False
            self._lay_out(lengths)

        uniform = random_numbers(
            batch, len(prompts), schedule.num_generations, schedule.max_new_tokens
        )
        positions = [prompt.next_position for prompt in prompts]
        numbers = schedule.add(lengths, positions, uniform.numpy())
        self.prompts.update(zip(numbers, prompts, strict=True))
        self.held.append((batch, numbers))
        self.coming = None
        return True

    def _take_batch(self) -> Batch | None:
        """Take the next batch from the caller; None if there is none, or making it failed."""
        try:
            return next(self.batches, None)
        except UserError as error:  # raised when the batches before have ended
            self.error = error
            return None

    def _encoded(self) -> tuple[Batch, list[Prompt]] | None:
        """Encode the next batch; None if there is none, or if it cannot be encoded."""
        batch = self._take_batch()
        if batch is None or batch.prompts is not None:
            return batch and (batch, batch.prompts)
        try:
            return batch, self.means.encode.many(batch.examples)
        except UserError as error:
            self.error = error
            return None

    def _outgrows(self, lengths: list[int]) -> bool:
        """Tell whether prompts of these lengths need another pool, if memory allows for one."""
        layout, samples = self.schedule.layout, len(lengths) * self.schedule.num_generations
        is_limited = layout.sample_spans < self.expected or layout.sample_spans >= MOST_SAMPLES
        return max(lengths) > layout.prompt_tokens or (
            samples > layout.sample_spans and not is_limited
        )

    def _lay_out(self, lengths: list[int]) -> None:
        """Get a pool for prompts of these lengths, and for the largest batches so far."""
        self.longest, self.most = max(self.longest, *lengths), max(self.most, len(lengths))
        self.expected = min(self.most * self.schedule.num_generations, MOST_SAMPLES)
        following = self._take_batch()
        if following is not None:
            self.batches = chain([following], self.batches)
        self.schedule.lay_out(Layout(0, 0, 0, 0))
        self.decoder = self.launcher = None  # before the next pool needs the memory
        self.decoder, self.launcher = self.means.lay_out(
            [self.longest] * self.most, following is not None
        )
        self.schedule.lay_out(self.decoder.pool.layout)

    # --- samples --------------------------------------------------------------------------------

    def _begin(self, groups: list[Group]) -> None:
        """Encode the prompts of groups, and draw the first tokens of their samples."""
        prompts = [self.prompts[group.prompt] for group in groups]
        starts = [self.schedule.layout.prompt_start(group.span) for group in groups]
        hidden = self.means.prefill(prompts, self.decoder.pool, starts)
        for group, prompt in zip(groups, prompts, strict=True):
            self.prompts[group.prompt] = replace(prompt, pixel_values=None)

        uniform = torch.from_numpy(np.concatenate([group.uniform[:, 0] for group in groups]))
        ids = [prompt.input_ids for prompt in prompts]
        tokens, logprobs = self.decoder.first(hidden, ids, uniform)
        self.schedule.begin(groups, tokens.cpu().numpy(), logprobs.cpu().numpy())

    def _step(self) -> bool:
        """Launch a step, and record the oldest one; tell whether there was anything to do."""
        step = self.schedule.next_step()
        for prompt, span in step.new:
            self.decoder.reset_seen(span, self.prompts[prompt].input_ids)
        running = len(step.samples) > 0
        if running:
            self.launched.append((step, self.launcher.launch(step.table, step.uniform)))
        if not self.launched:
            return False
        if len(self.launched) > self.launcher.ahead or not running:
            earlier, wait = self.launched.popleft()
            self.schedule.record(earlier, *wait())
        return True
