"""Runners of bench_rollout.py that take turns: their calls, their memory, their attention."""

import time
from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
from measure import Case, excused, release
from rollout_work import Work

from mr1_fast.rollout import decoder

FIRST = ", first tokens"
"""Ends the name of a runner's case that samples one token each."""


def checked(runner: Callable, lengths: list[int]) -> None:
    """Call the runner; RuntimeError unless every sample has its length."""
    wrong = sum(a != b for a, b in zip(runner(lengths), lengths, strict=True))
    if wrong:
        raise RuntimeError(f"{wrong} of {len(lengths)} samples have another length than prescribed")


def allocated(device: str) -> int:
    """Bytes of tensors on the GPU; 0 on a CPU."""
    return torch.cuda.memory_allocated() if device == "cuda" else 0


class Turns:
    """Runners of one work that take turns.

    `kept` are the bytes on the GPU that a runner keeps between its calls, `peaks` the most that it
    needs in a call, with those.
    """

    def __init__(self, kinds: dict[str, type], work: Work, device: str, skipped: dict[str, str]):
        self.work, self.device = work, device
        self.runners, self.kept, self.peaks = {}, {}, {}
        for name, kind in kinds.items():
            before = allocated(device)
            with excused(name, skipped):
                self.kept[name], self.runners[name] = 0, kind(work)
                self.prepare(name)
                lengths = work.lengths
                if not name.startswith("ours"):
                    lengths = [min(n, work.warm_up_tokens) for n in lengths]
                self.sample(name, lengths, before)
            self.rest()
            if name in skipped and name in self.runners:
                self.runners.pop(name).release()
            release()
            self.kept[name] = allocated(device) - before

    def rest(self) -> None:
        """Let no runner be prepared."""
        for runner in self.runners.values():
            runner.rest()

    def prepare(self, name: str) -> None:
        """Prepare this runner and no other."""
        self.rest()
        self.runners[name].prepare()

    def sample(self, name: str, lengths: list[int], before: int | None = None) -> None:
        """Call the runner and note its peak memory beyond `before`, the bytes that others use."""
        if before is None:
            before = allocated(self.device) - self.kept[name]
        if self.device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        checked(self.runners[name], lengths)
        if self.device == "cuda":
            peak = torch.cuda.max_memory_allocated() - before
            self.peaks[name] = max(self.peaks.get(name, 0), peak)

    def cases(self) -> dict[str, Case]:
        """Two cases of each runner: all tokens, and the first token of each sample."""
        first, cases = [1] * len(self.work.lengths), {}
        for name, runner in self.runners.items():
            prepare = partial(self.prepare, name)
            cases[name] = Case(partial(self.sample, name, self.work.lengths), prepare)
            cases[name + FIRST] = Case(partial(checked, runner, first), prepare)
        return cases


def attention_seconds(turns: Turns) -> dict[str, float]:
    """Seconds of attention in a step, of each of our runners: a call more, on a CPU."""
    found, work = {}, turns.work
    for name in turns.runners:
        if not name.startswith("ours"):
            continue
        turns.prepare(name)
        taken = 0.0

        def timed(*arguments, attend=decoder.attend, **options):
            nonlocal taken
            start = time.perf_counter()
            out = attend(*arguments, **options)
            taken += time.perf_counter() - start
            return out

        with mock.patch.object(decoder, "attend", timed):
            checked(turns.runners[name], work.lengths)
        found[name] = taken / (max(work.lengths) - 1)
    turns.rest()
    return found
