"""Data on the way: the next step's prompts are read and encoded while a GPU computes a step."""

import threading
import time
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor
from dataclasses import dataclass
from types import TracebackType

from .run import Run
from .types import Example, Prompt


@dataclass(frozen=True)
class StepData:
    """What a step begins with on this process: its share of the step's examples."""

    examples: list[Example]
    """Examples, B of all processes."""
    prompts: list[Prompt]
    """The examples as the model sees them, a prompt for each; their tensors are on the CPU."""
    waited: float = 0.0
    """How long the step had to wait for them, in seconds."""


def read_step(run: Run, step: int, ended: threading.Event | None = None) -> StepData:
    """Read and encode this process's share of the examples of a step, one after the other.

    Raises UserError for one that cannot be used, and CancelledError before the next one once
    `ended` is set.
    """
    data, count = StepData([], []), run.config.prompts_per_step
    for entry in run.world.share(range(step * count, (step + 1) * count)):
        if ended is not None and ended.is_set():
            raise CancelledError
        (example,) = run.source.take(entry, 1)  # as in steps of one example
        data.examples.append(example)
        data.prompts.append(run.policy.encode(example))
    return data


class Ahead:
    """Context manager that has the data of the next step read in a thread.

    `thread`: whether it does; by default if the model is on a GPU. On a CPU the thread would take
    its time from the step, so the data are read when the step asks for them.

    What a step gets depends on its number alone, so the data are those that reading within the step
    would give. It holds the data of one step beside those that it has given out. Its thread ends
    with the context; an item that is being read is read to its end first.

    Sources and prompt writers may be used from several threads, so a step may read more on its own.

    >>> with Ahead(run) as ahead:  # doctest: +SKIP
    ...     for step in range(run.first_step, run.config.steps):
    ...         data = ahead.take(step)
    """

    def __init__(self, run: Run, thread: bool | None = None):
        self.run = run
        threaded = run.policy.device.type != "cpu" if thread is None else thread
        self._thread = ThreadPoolExecutor(1, "data ahead") if threaded else None
        self._coming: dict[int, Future[StepData]] = {}
        self._ended = threading.Event()

    def __enter__(self) -> "Ahead":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._ended.set()
        if self._thread:
            self._thread.shutdown()

    def take(self, step: int) -> StepData:
        """Return the data of a step, and begin to read those of the next one, if there is one.

        Raises what reading this step's data has raised.
        """
        start = time.perf_counter()
        coming = self._coming.pop(step, None)
        data = coming.result() if coming else read_step(self.run, step)
        waited = time.perf_counter() - start
        if self._thread and step + 1 < self.run.config.steps:
            coming = self._thread.submit(read_step, self.run, step + 1, self._ended)
            self._coming = {step + 1: coming}
        return StepData(data.examples, data.prompts, waited)
