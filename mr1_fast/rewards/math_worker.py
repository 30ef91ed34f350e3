"""The process in which math-verify reads model output: started by math_check.

    trainer ──request line──▶ zygote (imports math-verify once) ──the same line──▶ child (forked; parses, may die)
            ◀──reply line────                                   ◀──reply line────

A request is one line of JSON, [output, solution, seconds]; the reply is one too: `true` or `false`, or for a solution
of null what math-verify reads in the output, a string or `null`. sympy can spend hours inside one C call (a power of
big integers) where no Python signal handler runs, so the child arms a timer whose default action ends the process in
the kernel. Whatever a child dies of (timer, memory limit, stack overflow), the zygote answers `null` in its place, to
either kind of request, and forks the next one, which takes milliseconds.
"""

import contextlib
import gc
import json
import logging
import os
import resource
import signal
import sys
from typing import BinaryIO

MEMORY_BYTES = 2 << 30
"""Address space of a child. A larger intermediate result raises MemoryError there, and the reply is `null`."""
REQUESTS_PER_CHILD = 1000
"""A child is replaced after so many requests, so that sympy's caches cannot grow without end."""
PEAK_KIB = 512 << 10
"""A child is also replaced once its resident memory has peaked above this, in KiB."""
MAX_ANSWER_CHARS = 8192
"""An expression whose text is longer is no answer: cut short, it would be another one."""
LAST = b"last "
"""Before a reply (no JSON begins so): this child asks to be replaced."""
BLOCKED_EVENTS = frozenset(
    (
        *(
            "os.system",
            "os.exec",
            "os.posix_spawn",
            "os.spawn",
            "os.fork",
            "os.forkpty",
            "pty.spawn",
        ),
        *(
            "subprocess.Popen",
            "socket.connect",
            "socket.bind",
            "os.kill",
            "os.chmod",
            "os.chown",
            "os.truncate",
        ),
        *("os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink"),
    )
)
"""Audit events that reading an expression never needs. math-verify does not evaluate its input as Python; this is for
the day when some release does."""


def main() -> None:
    """Serve requests from stdin to stdout until stdin closes. The first line written is `"ready"` or an error text."""
    requests, replies = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    quiet = os.open(os.devnull, os.O_RDWR)
    for descriptor in (0, 1, 2):  # a stray print() in a library must not read as a reply
        os.dup2(quiet, descriptor)
    logging.disable(logging.CRITICAL)
    try:
        _warm_up()
    except ImportError as error:
        _write(replies, json.dumps(str(error)).encode() + b"\n")
        return
    _write(replies, b'"ready"\n')
    gc.freeze()  # objects shared with the children stay shared
    with contextlib.suppress(BrokenPipeError):  # the trainer is gone
        _supervise(requests, replies)


def _warm_up() -> None:
    """Import math-verify and build its regular expressions and grammar tables, so that no child has to."""
    for text in (
        r"The answer is $\frac{1}{2}+\sqrt{3}$",
        "<answer> 12.5 </answer>",
        "so 3*(4+5) = 27",
    ):
        equal(text, "1/2")
        read_answer(text)


def equal(output: str, solution: str) -> bool:
    """math-verify's verdict, in R1-V's order of arguments, with its own timeouts off (they need SIGALRM)."""
    from math_verify import (  # not at the top: its absence must reach the trainer as a message
        parse,
        verify,
    )

    answer, gold = parse(output, parsing_timeout=None), parse(solution, parsing_timeout=None)
    return bool(verify(answer, gold, timeout_seconds=None))


def read_answer(output: str) -> str | None:
    """The text of the first expression that math-verify reads in the output, as in R1-V's `extracted_answer`."""
    from math_verify import parse

    found = parse(output, parsing_timeout=None)
    text = str(found[0]) if found else None
    return text if text is None or len(text) <= MAX_ANSWER_CHARS else None


def _supervise(requests: BinaryIO, replies: BinaryIO) -> None:
    """The zygote: pass requests and replies on, and answer for a child that dies."""
    child = _Child(requests, replies)
    while line := requests.readline():
        for _ in range(2):
            reply = child.ask(line)
            if reply.endswith(b"\n"):
                break
            cause, reply = child.end(), b"null\n"
            child = _Child(requests, replies)
            if cause == signal.SIGALRM:
                break  # it took too long; of anything else (the out-of-memory killer, say) it may not be the cause
        _write(replies, reply.removeprefix(LAST))
        if reply.startswith(LAST) or child.served == REQUESTS_PER_CHILD:
            child.end()
            child = _Child(requests, replies)
    child.end()


class _Child:
    """A forked process that answers requests one at a time."""

    def __init__(self, *inherited: BinaryIO) -> None:
        self.served = 0
        from_us, to_child = os.pipe()
        from_child, to_us = os.pipe()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                # A copy of the zygote's end would keep the pipe open after the zygote has died.
                for descriptor in (to_child, from_child, *(file.fileno() for file in inherited)):
                    os.close(descriptor)
                _serve(os.fdopen(from_us, "rb"), os.fdopen(to_us, "wb"))
            finally:
                os._exit(0)  # never return into the zygote's loop, whatever was raised
        os.close(from_us)
        os.close(to_us)
        self.to_child, self.from_child = os.fdopen(to_child, "wb"), os.fdopen(from_child, "rb")

    def ask(self, line: bytes) -> bytes:
        """Pass a request on and return the reply line, which is cut short or empty if the child dies first."""
        self.served += 1
        try:
            _write(self.to_child, line)
        except BrokenPipeError:
            return b""
        return self.from_child.readline()

    def end(self) -> int:
        """Kill and reap the process and close its pipes. Returns the signal that ended it."""
        os.kill(self.pid, signal.SIGKILL)  # without effect if it is already dead
        _, status = os.waitpid(self.pid, 0)
        for file in (self.to_child, self.from_child):
            with contextlib.suppress(
                BrokenPipeError
            ):  # the rest of a request that the child did not read
                file.close()
        return os.WTERMSIG(status)


def _serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """The child: limit what it may use and do, then answer until the pipe closes.

    With LAST it asks to be replaced. Leaving by itself could lose a request already on its way.
    """
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    signal.signal(
        signal.SIGALRM, signal.SIG_DFL
    )  # the default action ends the process even inside a C call
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    sys.dont_write_bytecode = True
    sys.addaudithook(_refuse)
    while line := requests.readline():
        output, solution, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))  # 0 would mean: never
        try:
            reply = read_answer(output) if solution is None else equal(output, solution)
        except Exception:  # MemoryError, RecursionError, …: what cannot be read is not right
            reply = None
        signal.setitimer(signal.ITIMER_REAL, 0)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > PEAK_KIB
        _write(replies, (LAST if grown else b"") + json.dumps(reply).encode() + b"\n")


def _refuse(event: str, arguments: tuple) -> None:
    """An audit hook: no commands, no network, no files changed."""
    writes = (
        event == "open"
        and isinstance(arguments[2], int)
        and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    )
    if event in BLOCKED_EVENTS or writes:
        raise PermissionError(event)


def _write(file: BinaryIO, line: bytes) -> None:
    file.write(line)
    file.flush()


if __name__ == "__main__":
    main()
