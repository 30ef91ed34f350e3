"""Running the reward functions of a step: all at the same time, and within a time limit.

Every function has a thread of its own; what it returns to be awaited runs in the event loop. The
threads are daemons, so that one that hangs does not keep the process from exiting.
"""

import asyncio
import inspect
import itertools
import math
import queue
import threading
import time
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch

from ..errors import UserError
from .event_loop import give_up_loop, wait_in_loop
from .functions import Batch, RewardFunction, arguments, is_batched, label, prompt_messages

NAMED_ROWS = 3
"""How many rows a message names."""

Values = list[float | None]
"""One reward of B·G completions; None where the function says nothing about a completion."""


class Job:
    """One reward function at work on the completions of a step."""

    def __init__(self, name: str, function: RewardFunction, batch: Batch):
        self.name, self.function, self.batch = name, function, batch
        self.batched = is_batched(name, function)
        self.label = label(name, function)
        self.working: Iterable[int] = range(len(batch.completions))
        """The completions that the function works on now."""
        self.error: UserError | None = None
        """What is known about a failure while its row is still sought."""

    def run(self) -> Values:
        """Return the function's values; raises UserError if it fails."""
        return self._all_at_once() if self.batched else self._one_by_one()

    def _one_by_one(self) -> Values:
        """Call a function of our form; if it is async, all its completions are awaited together."""
        found = []
        for i, completion in enumerate(self.batch.completions):
            self.working = [i]
            with self._failures([i]):
                value = self.function(completion, self.batch.example(i))
            found.append(value if inspect.isawaitable(value) else self._number(i, value))
        if any(map(inspect.isawaitable, found)):
            return wait_in_loop(self._gather(found))
        return found

    async def _gather(self, found: list) -> Values:
        """Await the values that are awaitable."""
        waiting = {i for i, value in enumerate(found) if inspect.isawaitable(value)}
        self.working = waiting

        async def finish(i: int) -> float:
            with self._failures([i]):
                value = await found[i]
            waiting.discard(i)
            return self._number(i, value)

        awaited = sorted(waiting)
        values = await asyncio.gather(*map(finish, awaited))
        for i, value in zip(awaited, values, strict=True):
            found[i] = value
        return found

    def _all_at_once(self) -> Values:
        """Call a function of TRL's form.

        Where it raises, it is called again for one row after the other, to find the one that fails.
        """
        given = arguments(self.name, self.function, self.batch)
        try:
            with self._failures(range(len(self.batch.completions))):
                result = self.function(**given)
                if inspect.isawaitable(result):
                    result = wait_in_loop(result)
                values = self._listed(result)
        except UserError as error:
            self.error = error
            raise self._narrowed(error) from error.__cause__
        return [self._number_or_none(i, value) for i, value in enumerate(values)]

    def _narrowed(self, error: UserError) -> UserError:
        """Return the error of the first row with which alone the function fails in the same way."""
        if error.__cause__ is None or len(self.batch.examples) == 1:
            return error
        for group in self.batch.groups():
            try:
                Job(self.name, self.function, group).run()
            except UserError as alone:
                if repr(alone.__cause__) == repr(error.__cause__):
                    return alone
        return error

    @contextmanager
    def _failures(self, indices: Iterable[int]) -> Iterator[None]:
        """Raise UserError, which names the rows, for whatever the function raises."""
        try:
            yield
        except (UserError, GeneratorExit):
            raise
        except BaseException as error:  # SystemExit, too: a thread would end without a word
            raise UserError(
                f"{self.label} raised {type(error).__name__}: {_shown(str(error))} at "
                f"{rows(self.batch, indices)}{self._hint(error)}: correct the function or the row."
            ) from error

    def _hint(self, error: BaseException) -> str:
        """Say why a completion is no list of messages, which most of TRL's functions expect."""
        if not self.batched or not isinstance(error, TypeError | IndexError):
            return ""
        if any(prompt_messages(example) for example in self.batch.examples):
            return ""
        return " (completions are texts here, since the prompts of the data are not messages)"

    def _listed(self, result: Any) -> list:
        """Return a batched function's result as a list of the right length."""
        count = len(self.batch.completions)
        try:
            values = None if isinstance(result, str | bytes | dict | set) else iter(result)
        except TypeError:
            values = None
        if values is None:
            raise UserError(
                f"{self.label} must return a list of {count} numbers, one for each completion, not "
                f"{_shown(repr(result))}."
            )
        listed = list(itertools.islice(values, count + 1))
        if len(listed) != count:
            length = len(listed) if len(listed) < count else "more"
            raise UserError(
                f"{self.label} must return {count} numbers, one for each completion, not {length}."
            )
        return listed

    def _number_or_none(self, index: int, value: Any) -> float | None:
        """Return a value of a batched function; NaN stands for None, as in TRL."""
        number = _as_float(value)
        if value is None or (number is not None and math.isnan(number)):
            return None
        return self._number(index, value)

    def _number(self, index: int, value: Any) -> float:
        """Return a value, checked: a single NaN would spoil every weight."""
        number = _as_float(value)
        if number is None or not abs(number) <= torch.finfo(torch.float32).max:
            raise UserError(
                f"{self.label} must return a finite number, not {_shown(repr(value))}, at "
                f"{rows(self.batch, [index])}."
            )
        return number


def run_jobs(jobs: list[Job], seconds: float) -> dict[str, Values]:
    """Run all jobs at once; returns each one's values by its name, in the order of the jobs.

    Raises UserError as soon as one fails, or if one has not ended after `seconds`.
    """
    finished: queue.SimpleQueue = queue.SimpleQueue()

    def work(job: Job) -> None:
        try:
            finished.put((job, job.run(), None))
        except BaseException as error:  # whatever it is, the step must not wait for this thread
            finished.put((job, None, error))

    for job in jobs:
        threading.Thread(target=work, args=(job,), daemon=True, name=f"reward {job.name}").start()

    deadline = time.monotonic() + min(seconds, threading.TIMEOUT_MAX / 2)
    values: dict[str, Values] = {}
    try:
        while len(values) < len(jobs):
            job, found, error = finished.get(timeout=max(0.0, deadline - time.monotonic()))
            if error is not None:
                raise error
            values[job.name] = found
    except queue.Empty:
        raise _overdue([job for job in jobs if job.name not in values], seconds) from None
    finally:
        if len(values) < len(jobs):
            give_up_loop()
    return {job.name: values[job.name] for job in jobs}


def rows(batch: Batch, indices: Iterable[int]) -> str:
    """Return the names of the rows of some completions, at most three of them."""
    # A tuple first: the set may change in another thread.
    names = list(dict.fromkeys(batch.example(i).name for i in sorted(tuple(indices))))
    more = f" and {len(names) - NAMED_ROWS} more" if len(names) > NAMED_ROWS else ""
    return ", ".join(names[:NAMED_ROWS]) + more


def _overdue(jobs: list[Job], seconds: float) -> UserError:
    """Return the error about jobs that have not ended in time."""
    for job in jobs:
        if job.error is not None:
            return job.error
    where = " ".join(
        f"{job.label} had not ended after {seconds:g} seconds, at {rows(job.batch, job.working)}."
        for job in jobs
    )
    return UserError(f"{where[:-1]}: make it faster, or raise --reward-seconds.")


def _shown(text: str) -> str:
    """Return the beginning of a text, in one line."""
    return " ".join(text[:300].split())


def _as_float(value: Any) -> float | None:
    """Return a number of any type as a float, or None if it is not a number."""
    try:
        # Texts have no __float__, though float() would read a number in them.
        return float(value) if hasattr(value, "__float__") else None
    except Exception:  # whatever a type of the user's raises
        return None
