"""A logger behind a bounded queue in a thread of its own, so that it cannot hold up a run."""

import queue
import threading
import time
from collections.abc import Callable, Iterable

from .logger import Logger
from .samples import Sample

RECORDS = 256
"""Records that may wait for a logger; further ones are dropped."""
CLOSE_SECONDS = 30.0
"""How long the end of a run waits for its loggers, all of them together."""


class Background:
    """The thread and the queue of one logger.

    It hands records on, in order, without waiting for the logger. Where the logger raises, `say` is
    told so once, and nothing more is handed to it. Where it is slower than the run, records are
    dropped; that is said once, too. The thread is a daemon: it does not keep a process alive.
    """

    def __init__(
        self,
        name: str,
        logger: Logger,
        say: Callable[[str], None],
        known_steps: int = 0,
        records: int = RECORDS,
        known_evaluations: int = 0,
    ):
        """`known_steps`: how many steps an earlier process has given to the logger already.

        known_evaluations: before which step it has given it the evaluations.
        """
        self.name, self.logger, self.say = name, logger, say
        self.known_steps = 0 if logger.REWRITES else known_steps
        self.known_evaluations = 0 if logger.REWRITES else known_evaluations
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(records)
        self._failed = self._full = False
        self._thread = threading.Thread(target=self._work, name=f"logger {name}", daemon=True)
        self._thread.start()

    def open(self, first_step: int) -> None:
        """Begin, or go on with, the run, whose next step is `first_step`."""
        self._put(lambda: self.logger.open(first_step))

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Record the metrics of a step."""
        if step >= self.known_steps:
            self._put(lambda: self.logger.log(metrics, step))

    def evaluation(self, metrics: dict[str, float], step: int) -> None:
        """Record the metrics of an evaluation, made after `step` steps."""
        if step >= self.known_evaluations:
            self._put(lambda: self.logger.log(metrics, step))

    def samples(self, samples: list[Sample], step: int) -> None:
        """Record some completions of a step."""
        if step >= self.known_steps:
            self._put(lambda: self.logger.samples(samples, step))

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """End the logger, and wait for that for some time at most."""
        deadline = time.monotonic() + seconds
        try:
            self._queue.put(None, timeout=seconds)
        except queue.Full:
            pass
        else:
            self._thread.join(max(0.0, deadline - time.monotonic()))
        if self._thread.is_alive():
            self.say(
                f"logger {self.name} did not end in time: its last records may be missing there, "
                "but metrics.jsonl has all of them."
            )

    def _put(self, call: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            self._queue.put_nowait(call)
        except queue.Full:
            if not self._full:
                self._full = True
                self.say(
                    f"logger {self.name} is slower than the run: records that it has no time for "
                    "are dropped there, but metrics.jsonl has all of them."
                )

    def _work(self) -> None:
        """Make the calls of the queue, until it holds None."""
        while (call := self._queue.get()) is not None:
            self._try(call)
        self._try(self.logger.close)

    def _try(self, call: Callable[[], None]) -> None:
        if self._failed:
            return
        try:
            call()
        except BaseException as error:  # SystemExit, too: this thread would end without a word
            self._failed = True
            reason = " ".join(str(error).split())[:300]
            self.say(
                f"logger {self.name} failed and is off for the rest of this run "
                f"({type(error).__name__}: {reason}); metrics.jsonl has every step."
            )


def close_all(loggers: Iterable[Background], seconds: float | None = None) -> None:
    """End the loggers, and wait CLOSE_SECONDS, or `seconds`, at most for all of them together."""
    deadline = time.monotonic() + (CLOSE_SECONDS if seconds is None else seconds)
    for logger in loggers:
        logger.close(max(0.0, deadline - time.monotonic()))
