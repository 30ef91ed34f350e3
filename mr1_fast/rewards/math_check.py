"""Reading a model's answer with math-verify and comparing it with the solution.

Both take bounded time and memory, and so do all answers of a step together. Model output is hostile
input: `9^{9^{9^{9}}}` alone keeps sympy busy for ever. It is therefore read by a separate process
(math_worker), which is started at the first question and ends with this process.
"""

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import UserError
from .math_worker import Channel

MAX_CHARS = 8192
"""How many of an output's characters are read: the last ones, since the answer is at the end."""
START_SECONDS = 120.0
"""How long the worker may take to import math-verify. It takes half a second; disks can be slow."""
GRACE_SECONDS = 5.0
"""How long after its deadline a reply may come before the worker itself counts as dead."""
STEP_SECONDS = 32.0
"""How long the slow answers of a step may take together."""
SHARE = 1 / 32
"""The part of what is left of that time that one answer may take, so that slow ones leave time to
those after them."""
QUICK_SECONDS = 0.1
"""The time that every answer may take beside. An ordinary one takes a few milliseconds."""


def math_equal(output: str, solution: str, seconds: float = 1.0) -> bool:
    """Return R1-V's verdict: whether math-verify finds an answer in the output that equals the
    solution.

    `output` is the whole completion and may be any string at all; its last 8,192 characters are
    read. `solution` is the bare answer text, for example `145°`. A call takes 1–2 ms. An output
    whose reading takes longer than `seconds` (wall time), needs more than 2 GiB or crashes the
    parser is not equal. Safe to call from any thread. Raises UserError if math-verify cannot be
    imported; nothing that the strings contain raises an error.
    """
    return math_verdict(output, solution, seconds) is True


def math_verdict(output: str, solution: str, seconds: float = 1.0) -> bool | None:
    """Return what `math_equal` does, or None where the output could not be read."""
    return _client.ask(output, solution[-MAX_CHARS:], seconds)


def math_answer(output: str, seconds: float = 1.0) -> str | None:
    """Return R1-V's `extracted_answer`: the first expression that math-verify finds in the output.

    The expression is returned as text and is not evaluated: `9^{9^{9}}` gives `9**(9**9)`. An
    answer that math-verify cannot parse is returned as it stands. Returns None if nothing is found
    or if the text is longer than 8,192 characters. Limits and errors are those of `math_equal`.
    """
    return _client.ask(output, None, seconds)


@contextmanager
def time_of_a_step(seconds: float = STEP_SECONDS) -> Iterator[None]:
    """Let the slow answers that are read within a block, in any thread, take `seconds` together.

    Every answer may take QUICK_SECONDS, which do not count, and beside them a part of what is left:
    128 that never end are given up after some 40 s.
    """
    _client.left = seconds
    try:
        yield
    finally:
        _client.left = None


class _WorkerDied(Exception):
    """The worker closed its pipe or did not reply in time."""


class _Worker:
    """The running math_worker process and the pipes to it."""

    def __init__(self) -> None:
        self.process = subprocess.Popen(
            # Run as a file, since importing the package would load torch. -P keeps the file's
            # folder off the path, where its neighbours could be taken for other modules.
            [sys.executable, "-P", str(Path(__file__).with_name("math_worker.py"))],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            bufsize=0,
            # Ctrl-C must not end the worker: the trainer may still score while it shuts down.
            start_new_session=True,
        )
        self.channel = Channel(self.process.stdin.fileno(), self.process.stdout.fileno())
        try:
            greeting = _value(self.channel.read_line(time.monotonic() + START_SECONDS))
        except BaseException as error:
            self.stop()
            if isinstance(error, TimeoutError):
                raise _WorkerDied from error
            raise
        if greeting != "ready":
            self.stop()
            raise UserError(
                f"math-verify cannot be imported ({greeting}): run `pip install math-verify`."
            )

    def ask(self, request: bytes, seconds: float) -> bool | str | None:
        """Send one request line and return its reply; raises _WorkerDied."""
        try:  # the worker may try twice
            return _value(self.channel.ask(request, 2 * seconds + GRACE_SECONDS))
        except TimeoutError as error:
            raise _WorkerDied from error

    def close_pipes(self) -> None:
        """Close this process's ends of the pipes; the worker exits when its input ends."""
        for pipe in (self.process.stdin, self.process.stdout):
            pipe.close()

    def stop(self) -> None:
        """End the process and its child."""
        with suppress(ProcessLookupError):
            # All of its session, since a child that somebody has stopped sees no end of its input.
            os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.close_pipes()


def _value(line: bytes) -> bool | str | None:
    """Return what a whole line says; raises _WorkerDied for one that is cut short."""
    if not line.endswith(b"\n"):
        raise _WorkerDied
    return json.loads(line)


class _Client:
    """The one worker of this process, shared by its threads and started at the first question."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.worker: _Worker | None = None
        self.left: float | None = None
        """Seconds that are left for slow answers, under `time_of_a_step`."""

    def ask(self, output: str, solution: str | None, seconds: float) -> bool | str | None:
        """Return the worker's reply to one request.

        A worker that died is restarted once. If the new one dies too, the reply is None. Raises
        UserError if no worker can be started.
        """
        with self.lock:
            if self.left is not None:
                seconds = min(seconds, QUICK_SECONDS + SHARE * self.left)
            request = json.dumps([output[-MAX_CHARS:], solution, seconds]).encode() + b"\n"
            for is_last in (False, True):
                try:
                    self.worker = self.worker or _Worker()
                    with self._counted(seconds):
                        return self.worker.ask(request, seconds)
                except (_WorkerDied, OSError) as error:
                    if is_last and self.worker is None:
                        raise UserError(
                            "The math-verify worker (mr1_fast/rewards/math_worker.py) does not "
                            "start."
                        ) from error
                    self.stop()
                except BaseException:
                    self.stop()  # or the next question would read the reply to this one
                    raise
            return None

    @contextmanager
    def _counted(self, seconds: float) -> Iterator[None]:
        """Take the time of a block, beyond QUICK_SECONDS, from what is left.

        It counts no more than the `seconds` that the answer has: this process may be suspended.
        """
        started = time.monotonic()
        try:
            yield
        finally:
            taken = min(time.monotonic() - started, seconds) - QUICK_SECONDS
            if self.left is not None:
                self.left -= max(0.0, taken)

    def stop(self) -> None:
        """End the worker; the next question starts another one."""
        worker, self.worker = self.worker, None
        if worker is not None:
            worker.stop()

    def forget(self) -> None:
        """Give up the worker in a forked child, since it belongs to the parent.

        The child gets a new lock: another thread of the parent may have held the old one.
        """
        worker, self.worker, self.lock = self.worker, None, threading.Lock()
        if worker is not None:
            worker.close_pipes()  # or the worker would outlive the parent
            worker.process.returncode = 0  # the parent waits for it


_client = _Client()
atexit.register(_client.stop)
os.register_at_fork(after_in_child=_client.forget)
