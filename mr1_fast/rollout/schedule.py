"""Who runs in which row, and when it ends: the host's part of decoding, in plain numbers.

Of a sample, `counts` tokens are known and `launched` are known or on their way; the device may be a step ahead. A
sample that ended has then run once too often: what came of that is dropped.
"""

from collections import deque
from collections.abc import Callable

import numpy as np

from ..errors import UserError
from .cache import Layout
from .decoder import COLUMNS

Ends = Callable[[int, np.ndarray], str | None]
"""ends(sample, its tokens so far): why the completion ends here, or None."""


class Schedule:
    """B prompts with G samples each; sample i belongs to prompt i // G. They run in order, as room allows.

    `lengths` and `positions` are the prompts' tokens and where their completions continue; `uniform` (B·G, M) holds
    each sample's random numbers, M = max_new_tokens.
    """

    def __init__(
        self,
        lengths: list[int],
        positions: list[int],
        num_generations: int,
        layout: Layout,
        uniform,
        ends: Ends,
    ):
        count, self.most = uniform.shape
        self.group, self.layout, self.uniform, self.ends = num_generations, layout, uniform, ends
        self.lengths, self.positions = np.array(lengths), np.array(positions)
        self.tokens = np.zeros((count, self.most), dtype=np.int32)
        self.logprobs = np.zeros((count, self.most), dtype=np.float32)
        self.counts, self.launched = np.zeros((2, count), dtype=np.int64)
        self.reasons: list[str] = [""] * count
        self.ended = np.zeros(count, dtype=bool)

        self.encoded = 0  # prompts, in order
        self.waiting: deque[int] = deque()  # samples of encoded prompts, with their first token
        self.running = np.zeros(0, dtype=np.int64)
        self.rows = np.zeros(count, dtype=np.int64)  # where each was in the step before
        self.prompt_spans, self.sample_spans = (
            np.zeros(len(lengths), dtype=np.int64),
            np.zeros(count, dtype=np.int64),
        )
        self.free_prompts = deque(range(layout.prompt_spans))
        self.free_samples = deque(range(layout.sample_spans))
        self.unfinished = np.full(len(lengths), num_generations)

    # --- prompts --------------------------------------------------------------------------------------------------

    def next_prompts(self, most_tokens: int) -> list[int]:
        """Prompts to encode now, which have got their spans: where a free place would find no one waiting."""
        chosen, tokens, places = [], 0, len(self.free_samples) - len(self.waiting)
        while self.encoded < len(self.lengths) and self.free_prompts and places > 0:
            tokens += self.lengths[self.encoded]
            if chosen and tokens > most_tokens:
                break
            chosen.append(self.encoded)
            self.prompt_spans[self.encoded] = self.free_prompts.popleft()
            self.encoded += 1
            places -= self.group
        return chosen

    def samples_of(self, prompts: list[int]) -> np.ndarray:
        """The samples of prompts, in order."""
        return (np.array(prompts)[:, None] * self.group + np.arange(self.group)).flatten()

    def begin(self, samples: np.ndarray, tokens: np.ndarray, logprobs: np.ndarray) -> None:
        """First tokens; the samples wait for a place."""
        self.launched[samples] = 1
        self.record(samples, tokens, logprobs)
        self.waiting.extend(samples[~self.ended[samples]].tolist())

    # --- steps ----------------------------------------------------------------------------------------------------

    def next_step(self) -> tuple[np.ndarray, list[int], np.ndarray, np.ndarray]:
        """Samples of the next step in row order, those among them that are new, and `Decoder.launch`'s arguments."""
        going = self.running[~self.ended[self.running] & (self.launched[self.running] < self.most)]
        new = []
        while self.waiting and self.free_samples:
            new.append(self.waiting.popleft())
            self.sample_spans[new[-1]] = self.free_samples.popleft()
        samples = np.sort(
            np.concatenate([going, np.array(new, dtype=np.int64)])
        )  # a prompt's are side by side
        table, uniform = self._table(samples), self.uniform[samples, self.launched[samples]]
        self.rows[samples] = np.arange(len(samples))
        self.launched[samples] += 1
        self.running = samples
        return samples, new, table, uniform

    def _table(self, samples: np.ndarray) -> np.ndarray:
        prompts, launched = samples // self.group, self.launched[samples]
        table = np.empty((len(samples), len(COLUMNS)), dtype=np.int32)
        known = self.counts[samples] == launched
        table[:, 0] = np.where(known, self.tokens[samples, launched - 1], -1)
        table[:, 1] = self.rows[samples]
        table[:, 2] = self.positions[prompts] + launched - 1
        table[:, 3] = self.layout.prompt_start(self.prompt_spans[prompts])
        table[:, 4] = self.lengths[prompts]
        table[:, 5] = self.layout.sample_start(self.sample_spans[samples])
        table[:, 6] = launched
        table[:, 7] = self.sample_spans[samples]
        return table

    def record(self, samples: np.ndarray, tokens: np.ndarray, logprobs: np.ndarray) -> None:
        """Results of a step. UserError for a token of −1, which a row with NaN gives."""
        live = ~self.ended[samples]
        samples, tokens, logprobs = samples[live], tokens[live], logprobs[live]
        if (tokens < 0).any():
            raise UserError(
                f"the model's logits are NaN after {self.counts[samples[tokens < 0][0]]} tokens of a completion: its "
                "weights are damaged, or training has diverged. Go back to an earlier checkpoint, or lower "
                "--learning-rate."
            )
        counts = self.counts[samples]
        self.tokens[samples, counts], self.logprobs[samples, counts] = tokens, logprobs
        self.counts[samples] = counts + 1
        for sample, count in zip(samples.tolist(), (counts + 1).tolist(), strict=True):
            reason = self.ends(sample, self.tokens[sample, :count]) or (
                "length" if count == self.most else None
            )
            if reason:
                self._end(sample, reason)

    def _end(self, sample: int, reason: str) -> None:
        self.ended[sample], self.reasons[sample] = True, reason
        if self.launched[sample] > 1:  # it has had a place
            self.free_samples.append(int(self.sample_spans[sample]))
        prompt = sample // self.group
        self.unfinished[prompt] -= 1
        if not self.unfinished[prompt]:
            self.free_prompts.append(int(self.prompt_spans[prompt]))
