"""Which sample runs in which row, and when it ends: the host's part of decoding, in plain numbers.

Of each sample, `counts` tokens are known on the host, and `launched` are known or being computed:
the device may be a step ahead. A sample that has ended has then run once too often, and what came
of that is dropped.
"""

from collections import deque
from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from ..errors import UserError
from .cache import Layout
from .table import Columns

Ends = Callable[[int, np.ndarray], str | None]
"""ends(sample, its tokens so far) → the reason why the completion ends here, or None."""


class Step(NamedTuple):
    """One decode step of R rows."""

    samples: np.ndarray
    """(R,) int64 samples, in the order of their rows; a prompt's samples are side by side."""
    new: list[int]
    """Those of the samples that run for the first time."""
    table: np.ndarray
    """(R, 8) int32, `Columns`."""
    uniform: np.ndarray
    """(R,) fp32 random numbers in [0, 1)."""


class Schedule:
    """Schedules G = `num_generations` samples for each of B prompts.

    Sample i belongs to prompt i // G. Prompts are encoded and samples run in order, as many at once
    as the layout has spans for.

    lengths: B numbers of tokens of the prompts.
    positions: B positions at which the prompts' completions continue.
    uniform: (B·G, M) fp32 random numbers of each sample, M = max_new_tokens.
    ends: decides when a completion ends; the one with M tokens ends anyway.
    """

    def __init__(
        self,
        lengths: list[int],
        positions: list[int],
        num_generations: int,
        layout: Layout,
        uniform: np.ndarray,
        ends: Ends,
    ):
        count, self.max_new_tokens = uniform.shape
        self.num_generations, self.layout = num_generations, layout
        self.uniform, self.ends = uniform, ends
        self.lengths, self.positions = np.array(lengths), np.array(positions)

        # What is known of each sample
        self.tokens = np.zeros((count, self.max_new_tokens), dtype=np.int32)
        self.logprobs = np.zeros((count, self.max_new_tokens), dtype=np.float32)
        self.counts = np.zeros(count, dtype=np.int64)
        self.launched = np.zeros(count, dtype=np.int64)
        self.ended = np.zeros(count, dtype=bool)
        self.reasons = [""] * count

        # Who is where: prompts are encoded in order; samples wait with their first token, then run
        self.encoded = 0
        self.waiting: deque[int] = deque()
        self.running = np.zeros(0, dtype=np.int64)
        self.row_of_sample = np.zeros(count, dtype=np.int64)  # in the latest step
        self.unfinished = np.full(len(lengths), num_generations)  # samples of each prompt

        # Spans of the pool
        self.span_of_prompt = np.zeros(len(lengths), dtype=np.int64)
        self.span_of_sample = np.zeros(count, dtype=np.int64)
        self.free_prompt_spans = deque(range(layout.prompt_spans))
        self.free_sample_spans = deque(range(layout.sample_spans))

    # --- prompts --------------------------------------------------------------------------------

    def next_prompts(self, most_tokens: int) -> list[int]:
        """Choose prompts to encode now, and give each a span of the pool.

        Prompts are chosen while sample spans would stay free for lack of waiting samples. Together
        they have at most `most_tokens` tokens; a longer prompt is encoded alone.
        """
        chosen: list[int] = []
        tokens = 0
        unclaimed = len(self.free_sample_spans) - len(self.waiting)
        while self.encoded < len(self.lengths) and self.free_prompt_spans and unclaimed > 0:
            tokens += self.lengths[self.encoded]
            if chosen and tokens > most_tokens:
                break
            self.span_of_prompt[self.encoded] = self.free_prompt_spans.popleft()
            chosen.append(self.encoded)
            self.encoded += 1
            unclaimed -= self.num_generations
        return chosen

    def samples_of(self, prompts: list[int]) -> np.ndarray:
        """List the samples of prompts, in order."""
        first = np.array(prompts)[:, None] * self.num_generations
        return (first + np.arange(self.num_generations)).flatten()

    def begin(self, samples: np.ndarray, tokens: np.ndarray, logprobs: np.ndarray) -> None:
        """Record the first tokens of samples, which then wait for a span unless they have ended."""
        self.launched[samples] = 1
        self.record(samples, tokens, logprobs)
        self.waiting.extend(samples[~self.ended[samples]].tolist())

    # --- steps ----------------------------------------------------------------------------------

    def next_step(self) -> Step:
        """Choose the samples of the next step, which may be none, and describe their rows."""
        new = self._admit()
        more = ~self.ended[self.running] & (self.launched[self.running] < self.max_new_tokens)
        samples = np.concatenate([self.running[more], np.array(new, dtype=np.int64)])
        samples.sort()  # a prompt's samples side by side
        step = Step(
            samples, new, self._table(samples), self.uniform[samples, self.launched[samples]]
        )

        self.row_of_sample[samples] = np.arange(len(samples))
        self.launched[samples] += 1
        self.running = samples
        return step

    def _admit(self) -> list[int]:
        """Give free spans to waiting samples, in order, and return those samples."""
        admitted = []
        while self.waiting and self.free_sample_spans:
            sample = self.waiting.popleft()
            self.span_of_sample[sample] = self.free_sample_spans.popleft()
            admitted.append(sample)
        return admitted

    def _table(self, samples: np.ndarray) -> np.ndarray:
        """Describe the rows of a step's samples: (R, 8) int32, `Columns`."""
        prompts, launched = samples // self.num_generations, self.launched[samples]
        known = self.counts[samples] == launched
        columns = Columns(
            token=np.where(known, self.tokens[samples, launched - 1], -1),
            source=self.row_of_sample[samples],
            position=self.positions[prompts] + launched - 1,
            prefix_start=self.layout.prompt_start(self.span_of_prompt[prompts]),
            prefix_len=self.lengths[prompts],
            own_start=self.layout.sample_start(self.span_of_sample[samples]),
            own_len=launched,
            span=self.span_of_sample[samples],
        )
        return np.stack(columns, axis=1).astype(np.int32)

    def record(self, samples: np.ndarray, tokens: np.ndarray, logprobs: np.ndarray) -> None:
        """Record the results of a step, and end the samples whose completion is over.

        samples, tokens, logprobs: (R,) each. Samples that had ended before are ignored. Raises
        UserError for a token of −1, which a row with NaN gives.
        """
        live = ~self.ended[samples]
        samples, tokens, logprobs = samples[live], tokens[live], logprobs[live]
        counts = self.counts[samples]
        if (tokens < 0).any():
            raise UserError(
                f"the model's logits are NaN after {counts[tokens < 0][0]} tokens of a completion: "
                "its weights are damaged, or training has diverged. Go back to an earlier "
                "checkpoint, or lower --learning-rate."
            )
        self.tokens[samples, counts], self.logprobs[samples, counts] = tokens, logprobs
        self.counts[samples] = counts + 1

        for sample, count in zip(samples.tolist(), (counts + 1).tolist(), strict=True):
            reason = self.ends(sample, self.tokens[sample, :count])
            if reason is None and count == self.max_new_tokens:
                reason = "length"
            if reason is not None:
                self._end(sample, reason)

    def _end(self, sample: int, reason: str) -> None:
        """End a sample, and free its span, and its prompt's if it is the last sample of that."""
        self.ended[sample], self.reasons[sample] = True, reason
        if self.launched[sample] > 1:  # a sample that ends with its first token has no span
            self.free_sample_spans.append(int(self.span_of_sample[sample]))

        prompt = sample // self.num_generations
        self.unfinished[prompt] -= 1
        if not self.unfinished[prompt]:
            self.free_prompt_spans.append(int(self.span_of_prompt[prompt]))

    # --- results --------------------------------------------------------------------------------

    def completions(self) -> list[np.ndarray]:
        """List the tokens of each sample, (L_i,) int32."""
        return [ids[:n] for ids, n in zip(self.tokens, self.counts, strict=True)]

    def completion_logprobs(self) -> list[np.ndarray]:
        """List the log-probabilities of each sample's tokens, (L_i,) fp32."""
        return [values[:n] for values, n in zip(self.logprobs, self.counts, strict=True)]
