"""Which sample runs in which row, and when it ends: the host's part of decoding, in plain numbers.

Prompts and their samples are added batch by batch, while others run, and a batch whose samples have
all ended is taken out. What is known of a sample while it runs is kept by its span of the pool, so
that memory is bounded however many samples there are in all.

Of each running sample, `counts` tokens are known on the host, and `launched` are known or being
computed: the device may be a step ahead. A sample that has ended has then run once too often, and
what came of that is dropped.
"""

from collections import deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from ..divergence import NoNumbers
from .cache import Layout
from .table import Columns

Ends = Callable[[int, np.ndarray], str | None]
"""ends(sample, its tokens so far) → the reason why the completion ends here, or None."""

FREE_PART = 8
"""Prompts are encoded when one in so many sample spans is free, and then for all that are free.

Encoding one prompt alone takes as long as a step or longer, because it reads all weights; a row
without a sample costs a step hardly anything.
"""


@dataclass(eq=False)
class Results:
    """What the samples of a batch have given; a sample that has not ended has no tokens yet."""

    completions: list[np.ndarray]
    """The tokens of each sample, (L_i,) int32."""
    logprobs: list[np.ndarray]
    """The log-probabilities of each sample's tokens, (L_i,) fp32."""
    reasons: list[str]
    """Why each sample ended."""
    unfinished: int
    """Samples that have not ended."""


@dataclass(eq=False)
class Group:
    """A prompt and its G samples, from when it is added until all of them have ended."""

    prompt: int
    """The prompt's number; its samples have the numbers from prompt · G on."""
    length: int
    """Tokens of the prompt."""
    position: int
    """The position at which the prompt's completions continue."""
    uniform: np.ndarray
    """(G, M) fp32 random numbers of each sample."""
    results: Results
    """Where the samples' results go, from index `first` on."""
    first: int
    unfinished: int
    """Samples that have not ended."""
    span: int = -1
    """The prompt's span of the pool, once it has one."""


class Step(NamedTuple):
    """One decode step of R rows."""

    samples: np.ndarray
    """(R,) int64 samples, in the order of their rows; a prompt's samples are side by side."""
    spans: np.ndarray
    """(R,) int64, their spans."""
    new: list[tuple[int, int]]
    """Prompt and span of each sample that runs for the first time."""
    table: np.ndarray
    """(R, 8) int32, `Columns`."""
    uniform: np.ndarray
    """(R,) fp32 random numbers in [0, 1)."""


class Schedule:
    """Schedules G = `num_generations` samples of up to M = `max_new_tokens` tokens for each prompt.

    Prompts are numbered as they are added, over all batches; sample i belongs to prompt i // G.
    Prompts are encoded and samples run in order, as many at once as the layout has spans for. There
    are none before the first `lay_out`.

    ends: decides when a completion ends; the one with M tokens ends anyway.
    """

    def __init__(self, num_generations: int, max_new_tokens: int, ends: Ends):
        self.num_generations, self.max_new_tokens = num_generations, max_new_tokens
        self.ends = ends
        self.batches: deque[Results] = deque()
        self.count = 0
        """Prompts that were added."""
        self.groups: dict[int, Group] = {}
        """Prompts with samples that have not ended, by number."""

        # Prompts are encoded in order; samples wait with their first token and its log-probability.
        self.unencoded: deque[Group] = deque()
        self.waiting: deque[tuple[int, int, float]] = deque()
        self.lay_out(Layout(0, 0, 0, 0))

    def lay_out(self, layout: Layout) -> None:
        """Use a pool with this layout from now on; nothing may run."""
        self.layout = layout
        spans, tokens = layout.sample_spans, self.max_new_tokens
        self.free_prompt_spans = deque(range(layout.prompt_spans))
        self.free_sample_spans = deque(range(spans))
        self.filling = False
        """Whether prompts are being encoded, for all free spans."""
        self.running = np.zeros(0, dtype=np.int64)
        """Spans of the samples in the latest step, by rows."""

        # What is known of the sample in each span
        self.sample = np.full(spans, -1)
        """The sample's number; −1 in a free span."""
        self.tokens = np.zeros((spans, tokens), dtype=np.int32)
        self.logprobs = np.zeros((spans, tokens), dtype=np.float32)
        self.uniform = np.zeros((spans, tokens), dtype=np.float32)
        self.counts = np.zeros(spans, dtype=np.int64)
        self.launched = np.zeros(spans, dtype=np.int64)
        self.row = np.zeros(spans, dtype=np.int64)
        """Its row in the latest step."""
        self.table = np.zeros((spans, len(Columns._fields)), dtype=np.int32)
        """Its row of a step's table as if no token were launched: what stays the same is here."""

    # --- batches --------------------------------------------------------------------------------

    @property
    def idle(self) -> bool:
        """Whether every sample that was added has ended."""
        return not self.groups

    @property
    def wants_prompts(self) -> bool:
        """Whether sample spans would stay free for lack of prompts."""
        if self.unencoded or not self.free_prompt_spans:
            return self.idle
        return self._room() > 0

    def add(self, lengths: list[int], positions: list[int], uniform: np.ndarray) -> range:
        """Add a batch of B prompts; returns their numbers.

        lengths: B numbers of tokens of the prompts, which fit the layout's spans.
        positions: B positions at which the prompts' completions continue.
        uniform: (B·G, M) fp32 random numbers of each sample.
        """
        count, size = len(uniform), self.num_generations
        results = Results(
            completions=[np.zeros(0, dtype=np.int32)] * count,
            logprobs=[np.zeros(0, dtype=np.float32)] * count,
            reasons=["length"] * count,
            unfinished=count if self.max_new_tokens else 0,  # samples of no tokens have ended
        )
        self.batches.append(results)
        added = range(self.count, self.count + len(lengths))
        self.count = added.stop
        if results.unfinished:
            for index, prompt in enumerate(added):
                first = index * size
                numbers = uniform[first : first + size]
                group = Group(
                    prompt, lengths[index], positions[index], numbers, results, first, size
                )
                self.groups[prompt] = group
                self.unencoded.append(group)
        return added

    def take(self) -> Results | None:
        """Take out the oldest batch if all of its samples have ended."""
        if self.batches and not self.batches[0].unfinished:
            return self.batches.popleft()
        return None

    # --- prompts --------------------------------------------------------------------------------

    def next_prompts(self, most_tokens: int) -> list[Group]:
        """Choose prompts to encode now, and give each a span of the pool.

        Prompts are chosen while sample spans would stay free for lack of waiting samples. Together
        they have at most `most_tokens` tokens; a longer prompt is encoded alone.
        """
        chosen: list[Group] = []
        tokens, room = 0, self._room()
        while self.unencoded and self.free_prompt_spans and room > 0:
            tokens += self.unencoded[0].length
            if chosen and tokens > most_tokens:
                break
            group = self.unencoded.popleft()
            group.span = self.free_prompt_spans.popleft()
            chosen.append(group)
            room -= self.num_generations
        self.filling = bool(chosen)
        return chosen

    def _room(self) -> int:
        """Count the sample spans for which no sample waits; 0 if they are too few to fill yet."""
        room = len(self.free_sample_spans) - len(self.waiting)
        return room if self.filling or room >= self.layout.sample_spans / FREE_PART else 0

    def begin(self, groups: list[Group], tokens: np.ndarray, logprobs: np.ndarray) -> None:
        """Record the first tokens of the groups' samples.

        A sample then waits for a span unless it has ended. tokens, logprobs: (P·G,) each.
        """
        check_tokens(tokens, np.zeros_like(tokens))
        size = self.num_generations
        samples = [group.prompt * size + i for group in groups for i in range(size)]
        values = zip(samples, tokens.tolist(), logprobs.tolist(), strict=True)
        for row, (sample, token, logprob) in enumerate(values):
            first = slice(row, row + 1)
            reason = self.ends(sample, tokens[first])
            if reason is not None or self.max_new_tokens == 1:
                self._end(sample, reason or "length", tokens[first], logprobs[first])
            else:
                self.waiting.append((sample, token, logprob))

    # --- steps ----------------------------------------------------------------------------------

    def next_step(self) -> Step:
        """Choose the samples of the next step, which may be none, and describe their rows."""
        spans = self.running
        more = (self.sample[spans] >= 0) & (self.launched[spans] < self.max_new_tokens)
        new = self._admit()
        # Samples are admitted in order, so the new ones follow, and a prompt's are side by side.
        spans = np.concatenate([spans[more], np.array([span for _, span in new], dtype=np.int64)])
        step = Step(
            samples=self.sample[spans],
            spans=spans,
            new=new,
            table=self._table(spans),
            uniform=self.uniform[spans, self.launched[spans]],
        )

        self.row[spans] = np.arange(len(spans))
        self.launched[spans] += 1
        self.running = spans
        return step

    def _admit(self) -> list[tuple[int, int]]:
        """Give free spans to waiting samples, in order; returns prompts and spans."""
        admitted = []
        while self.waiting and self.free_sample_spans:
            sample, token, logprob = self.waiting.popleft()
            span = self.free_sample_spans.popleft()
            group = self.groups[sample // self.num_generations]
            self.sample[span], self.row[span] = sample, 0
            self.counts[span] = self.launched[span] = 1
            self.tokens[span, 0], self.logprobs[span, 0] = token, logprob
            self.uniform[span] = group.uniform[sample % self.num_generations]
            self.table[span] = Columns(
                token=0,
                source=0,
                position=group.position - 1,
                prefix_start=self.layout.prompt_start(group.span),
                prefix_len=group.length,
                own_start=self.layout.sample_start(span),
                own_len=0,
                span=span,
            )
            admitted.append((group.prompt, span))
        return admitted

    def _table(self, spans: np.ndarray) -> np.ndarray:
        """Describe the rows of a step's samples: (R, 8) int32, `Columns`."""
        table, launched = self.table[spans], self.launched[spans]
        known = self.counts[spans] == launched
        columns = Columns(*table.T)
        columns.token[:] = np.where(known, self.tokens[spans, launched - 1], -1)
        columns.source[:] = self.row[spans]
        columns.position[:] += launched
        columns.own_len[:] = launched
        return table

    def record(self, step: Step, tokens: np.ndarray, logprobs: np.ndarray) -> None:
        """Record the results of a step, and end the samples whose completion is over.

        tokens, logprobs: (R,) each. Samples that had ended before are ignored. Raises NoNumbers for
        a token of −1, which a row with NaN gives.
        """
        live = self.sample[step.spans] == step.samples
        spans, tokens, logprobs = step.spans[live], tokens[live], logprobs[live]
        counts = self.counts[spans]
        check_tokens(tokens, counts)
        self.tokens[spans, counts], self.logprobs[spans, counts] = tokens, logprobs
        self.counts[spans] = counts = counts + 1

        samples = step.samples[live].tolist()
        for sample, span, count in zip(samples, spans.tolist(), counts.tolist(), strict=True):
            known = self.tokens[span, :count]
            reason = self.ends(sample, known)
            if reason is not None or count == self.max_new_tokens:
                self._end(sample, reason or "length", known, self.logprobs[span, :count])
                self.sample[span] = -1
                self.free_sample_spans.append(span)

    def _end(self, sample: int, reason: str, tokens: np.ndarray, logprobs: np.ndarray) -> None:
        """Keep the results of a sample, and free its prompt's span if it is the last of that."""
        prompt, index = divmod(sample, self.num_generations)
        group = self.groups[prompt]
        results, index = group.results, group.first + index
        results.completions[index] = tokens.astype(np.int32)
        results.logprobs[index], results.reasons[index] = logprobs.astype(np.float32), reason
        results.unfinished -= 1
        group.unfinished -= 1
        if not group.unfinished:
            self.free_prompt_spans.append(group.span)
            del self.groups[prompt]


def check_tokens(tokens: np.ndarray, counts: np.ndarray) -> None:
    """Raise NoNumbers for a token of −1, which NaN gives; `counts` tokens came before each."""
    if (tokens < 0).any():
        raise NoNumbers(
            f"the model's logits are NaN after {counts[tokens < 0][0]} tokens of a completion: "
            "its weights are damaged, or training has diverged. Go back to an earlier "
            "checkpoint, or lower --learning-rate."
        )
