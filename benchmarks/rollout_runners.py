"""Ways to sample the work of bench_rollout.py.

A runner is built from a `Work`. Called with a length for each sample, it returns the number of
tokens that each one got.
"""

import time
from contextlib import ExitStack
from dataclasses import fields

import numpy as np
import torch
from rollout_work import BATCH, Work
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import (
    ContinuousBatchingConfig,
    GenerationConfig,
    StoppingCriteria,
    StoppingCriteriaList,
)
from transformers.utils import is_flash_attn_2_available

from mr1_fast.model.attention import use_packed_attention
from mr1_fast.model.families import base_model
from mr1_fast.rollout.engine import Engine
from mr1_fast.rollout.sampling import Sampling
from mr1_fast.rollout.table import Columns

PATIENCE = 40.0
"""Seconds that continuous batching may take."""
PAGE = 256
"""Tokens of a block of continuous batching's cache: its default."""


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


class RowsApart(Prescribed):
    """Our engine with rows in an order in which no neighbours share a prefix, so none is shared."""

    def _prepare(self, *arguments) -> None:
        super()._prepare(*arguments)
        launcher = self._graphs or self._decoder
        if "launch" not in vars(launcher):  # the last launcher may have been kept
            launcher.launch = Reordered(launcher.launch)


class Reordered:
    """Launches steps with their rows in another order, which nobody but the device notices."""

    def __init__(self, launch):
        self.launch = launch
        self.place = np.zeros(0, dtype=np.int64)
        """Where the device has each row of the latest step."""

    def __call__(self, table: np.ndarray, uniform: np.ndarray):
        """`Decoder.launch`."""
        columns = Columns(*table.T)
        order = apart(columns.prefix_start)
        table = table[order]
        source = Columns(*table.T).source
        known = source < len(self.place)  # a new sample has no row before, and no use for it
        source[known] = self.place[source[known]]
        self.place = place = np.argsort(order)
        wait = self.launch(np.ascontiguousarray(table), uniform[order])
        return lambda: tuple(each[place] for each in wait())


def apart(prefix_start: np.ndarray) -> np.ndarray:
    """An order of rows (R,) that takes the first row of each prefix, then the second of each …"""
    order = np.argsort(prefix_start, kind="stable")
    ordered = prefix_start[order]
    nth = np.arange(len(order)) - np.searchsorted(ordered, ordered)
    return order[np.argsort(nth, kind="stable")]


class Ours(Runner):
    """Our engine, of class `kind`."""

    kind: type[Prescribed] = Prescribed

    def __init__(self, work: Work):
        super().__init__(work)
        self.engine = self.kind(work.model, work.processor)
        self.sampling = Sampling(max_new_tokens=max(work.lengths))

    def prepare(self) -> None:
        use_packed_attention(base_model(self.work.model))

    def __call__(self, lengths: list[int]) -> list[int]:
        self.engine.lengths = lengths
        rollout = self.engine.generate(
            self.work.examples, self.work.group, self.sampling, prompts=self.work.prompts
        )
        return [len(ids) for ids in rollout.completions]

    def release(self) -> None:
        self.engine.release()


class OursWithoutGraphs(Ours):
    """Our engine, every kernel launched by the host."""

    kind = WithoutGraphs


class OursApart(Ours):
    """Our engine, which reads a prefix once for each row."""

    kind = RowsApart


class OursMerged(Ours):
    """Our engine, the adapters being merged into the weights while it has its turn.

    It has graphs of its own, as a graph keeps the path on which it was captured.
    """

    is_merged = False

    def merge(self, wanted: bool) -> None:
        if self.is_merged != wanted:
            self.work.model.merge_adapter() if wanted else self.work.model.unmerge_adapter()
            self.is_merged = wanted

    def prepare(self) -> None:
        super().prepare()
        self.merge(True)

    def rest(self) -> None:
        self.merge(False)


class OursInBatches(Ours):
    """Our engine, called for BATCH prompts at a time."""

    def __call__(self, lengths: list[int]) -> list[int]:
        work, found = self.work, []
        for at in range(0, len(work.prompts), BATCH):
            self.engine.lengths = lengths[at * work.group :]
            some = slice(at, at + BATCH)
            rollout = self.engine.generate(
                work.examples[some], work.group, self.sampling, prompts=work.prompts[some]
            )
            found += [len(ids) for ids in rollout.completions]
        return found


class OursStreamed(Ours):
    """Our engine, which takes the next BATCH prompts when rows become free."""

    def __call__(self, lengths: list[int]) -> list[int]:
        from mr1_fast.rollout.stream import Batch

        work = self.work
        self.engine.lengths = lengths
        cuts = [slice(at, at + BATCH) for at in range(0, len(work.prompts), BATCH)]
        batches = [Batch(work.examples[cut], prompts=work.prompts[cut]) for cut in cuts]
        rollouts = self.engine.stream(batches, work.group, self.sampling)
        return [len(ids) for rollout in rollouts for ids in rollout.completions]


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
            self.work, num_return_sequences=self.work.group, max_new_tokens=max(lengths)
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
        self.ids = [prompt.input_ids.tolist() for prompt in work.prompts for _ in range(work.group)]
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
