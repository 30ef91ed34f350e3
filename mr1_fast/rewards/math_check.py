"""Reading a model's answer with math-verify and comparing it with the solution.

Both take bounded time and memory. Model output is hostile input: `9^{9^{9^{9}}}` alone keeps sympy
busy for ever. It is therefore read by a separate process (math_worker), which is started at the
first question and ends with this process.
"""

import atexit
import json
import os
import select
import subprocess
import sys
import threading
import time
from pathlib import Path

from ..errors import UserError

MAX_CHARS = 8192
"""How many of an output's characters are read: the last ones, since the answer is at the end."""
START_SECONDS = 120.0
"""How long the worker may take to import math-verify. It takes half a second; disks can be slow."""
GRACE_SECONDS = 5.0
"""How long after its deadline a reply may come before the worker itself counts as dead."""


def math_equal(output: str, solution: str, seconds: float = 1.0) -> bool:
    """Return R1-V's verdict: whether math-verify finds an answer in the output that equals the
    solution.

    `output` is the whole completion and may be any string at all; its last 8,192 characters are
    read. `solution` is the bare answer text, for example `145°`. A call takes 1–2 ms. An output
    whose reading takes longer than `seconds` (wall time), needs more than 2 GiB or crashes the
    parser is not equal. Safe to call from any thread. Raises UserError if math-verify cannot be
    imported; nothing that the strings contain raises an error.
    """
    return _client.ask(output, solution[-MAX_CHARS:], seconds) is True


def math_answer(output: str, seconds: float = 1.0) -> str | None:
    """Return R1-V's `extracted_answer`: the first expression that math-verify finds in the output.

    The expression is returned as text and is not evaluated: `9^{9^{9}}` gives `9**(9**9)`. An
    answer that math-verify cannot parse is returned as it stands. Returns None if nothing is found
    or if the text is longer than 8,192 characters. Limits and errors are those of `math_equal`.
    """
    return _client.ask(output, None, seconds)


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
        self.poll = select.poll()  # select() cannot watch descriptors above 1023
        self.poll.register(self.process.stdout, select.POLLIN | select.POLLHUP)
        try:
            greeting = self.read_line(START_SECONDS)
        except _WorkerDied:
            self.stop()
            raise
        if greeting != "ready":
            self.stop()
            raise UserError(
                f"math-verify cannot be imported ({greeting}): run `pip install math-verify`."
            )

    def ask(self, request: bytes, seconds: float) -> bool | str | None:
        """Send one request line and return its reply; raises _WorkerDied."""
        try:
            view = memoryview(request)
            while view:  # an unbuffered pipe may take less than it is given
                view = view[self.process.stdin.write(view) :]
        except OSError as error:
            raise _WorkerDied from error
        return self.read_line(2 * seconds + GRACE_SECONDS)  # the worker may try twice

    def read_line(self, seconds: float) -> bool | str | None:
        """Read one line of JSON; raises _WorkerDied at the end of file or after `seconds`."""
        line, deadline = b"", time.monotonic() + seconds
        while not line.endswith(b"\n"):
            if not self.poll.poll(max(0.0, deadline - time.monotonic()) * 1000):
                raise _WorkerDied
            chunk = os.read(self.process.stdout.fileno(), 4096)
            if not chunk:
                raise _WorkerDied
            line += chunk
        return json.loads(line)

    def close_pipes(self) -> None:
        """Close this process's ends of the pipes; the worker exits when its input ends."""
        for pipe in (self.process.stdin, self.process.stdout):
            pipe.close()

    def stop(self) -> None:
        """End the process; its child, if any, ends with its input or by its timer."""
        self.process.kill()
        self.process.wait()
        self.close_pipes()


class _Client:
    """The one worker of this process, shared by its threads and started at the first question."""

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.worker: _Worker | None = None

    def ask(self, output: str, solution: str | None, seconds: float) -> bool | str | None:
        """Return the worker's reply to one request.

        A worker that died is restarted once. If the new one dies too, the reply is None.
        """
        request = json.dumps([output[-MAX_CHARS:], solution, seconds]).encode() + b"\n"
        with self.lock:
            for _ in range(2):
                try:
                    self.worker = self.worker or _start()
                    return self.worker.ask(request, seconds)
                except _WorkerDied:
                    self.stop()
                except BaseException:
                    self.stop()  # or the next question would read the reply to this one
                    raise
            return None

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


def _start() -> _Worker:
    """Start a worker; raises UserError if it cannot be started."""
    try:
        return _Worker()
    except (_WorkerDied, OSError) as error:
        raise UserError(
            "The math-verify worker (mr1_fast/rewards/math_worker.py) does not start."
        ) from error


_client = _Client()
atexit.register(_client.stop)
os.register_at_fork(after_in_child=_client.forget)
