"""The process in which math-verify reads model output; math_check starts it.

    trainer ──request line──▶ zygote, which imports ──the same line──▶ child, forked,
            ◀──reply line──── math-verify once      ◀──reply line───── which parses and may die

A request is one line of JSON, [output, solution, seconds], and so is its reply. The reply is `true`
or `false`; if the solution is null, it is what math-verify reads in the output, a string or `null`.

sympy can spend hours inside one C call (a power of big integers), during which no Python signal
handler runs. The child therefore sets a timer whose default action, in the operating system's
kernel, ends the process. Whatever a child dies of (timer, memory limit, stack overflow), the zygote
replies `null` in its place, to either kind of request, and forks the next child, which takes
milliseconds. It kills a child that its timer does not end, as one that somebody has stopped.

Nothing is left behind: a child dies with the zygote, and the zygote sees that the trainer's end of
its pipe closes, also while a child works.
"""

import contextlib
import ctypes
import gc
import json
import logging
import os
import resource
import select
import signal
import sys
import time
from typing import BinaryIO

MEMORY_BYTES = 2 << 30
"""Address space of a child, in bytes. More raises MemoryError there, and the reply is `null`."""
REQUESTS_PER_CHILD = 1000
"""Requests after which a child is replaced, so that sympy's caches cannot grow without end."""
PEAK_KIB = 512 << 10
"""Peak of a child's resident memory, in KiB, above which it is replaced too."""
MAX_ANSWER_CHARS = 8192
"""The longest text of an expression that is an answer; cut short, it would be another answer."""
LATE_SECONDS = 1.0
"""How long after its time a child is waited for. Its timer begins when it has read the request."""
PARENT_DEATH_SIGNAL = 1
"""Linux: sets the signal that a process gets when its parent dies (`man 2 prctl`)."""
LAST = b"last "
"""What a child that asks to be replaced puts before its reply; no JSON begins like this."""
PROCESS_EVENTS = {
    "os.system",
    "os.exec",
    "os.posix_spawn",
    "os.spawn",
    "os.fork",
    "os.forkpty",
    "os.kill",
    "pty.spawn",
    "subprocess.Popen",
}
NETWORK_EVENTS = {"socket.connect", "socket.bind"}
FILE_EVENTS = {
    "os.chmod",
    "os.chown",
    "os.truncate",
    "os.remove",
    "os.rename",
    "os.rmdir",
    "os.mkdir",
    "os.link",
    "os.symlink",
}
BLOCKED_EVENTS = PROCESS_EVENTS | NETWORK_EVENTS | FILE_EVENTS
"""Audit events that reading an expression never raises. math-verify does not evaluate its input as
Python; they are refused for the day when some release does."""


class Channel:
    """The pipes to a process that answers a line with a line, of which neither end is waited for
    without a limit.

    `watched` is a pipe whose other end must stay open meanwhile.
    """

    def __init__(self, writing: int, reading: int, watched: int | None = None) -> None:
        self.writing, self.reading, self.watched = writing, reading, watched
        os.set_blocking(writing, False)  # a long line does not fit into a pipe that nobody reads

    def ask(self, line: bytes, seconds: float) -> bytes:
        """Send a line and return the reply; it is cut short or empty if the process dies first.

        Raises TimeoutError after `seconds`, and EOFError where the other end of `watched` closes.
        """
        deadline, rest = time.monotonic() + seconds, memoryview(line)
        try:
            while rest:
                self._wait(self.writing, select.POLLOUT, deadline)
                rest = rest[os.write(self.writing, rest) :]
        except BrokenPipeError:
            return b""
        return self.read_line(deadline)

    def read_line(self, deadline: float) -> bytes:
        """Return the next line, on the terms of `ask`; `deadline` is one of time.monotonic()."""
        reply = b""
        while not reply.endswith(b"\n"):
            self._wait(self.reading, select.POLLIN, deadline)
            part = os.read(self.reading, 65536)
            if not part:
                break
            reply += part
        return reply

    def _wait(self, descriptor: int, event: int, deadline: float) -> None:
        """Wait until a pipe is ready for something."""
        poll = select.poll()  # select() cannot watch descriptors above 1023
        poll.register(descriptor, event)
        if self.watched is not None:
            poll.register(self.watched, 0)  # which tells of its end alone
        ready = dict(poll.poll(max(0.0, deadline - time.monotonic()) * 1000))
        if self.watched in ready:
            raise EOFError
        if not ready:
            raise TimeoutError

    def close(self) -> None:
        """Close both pipes."""
        os.close(self.writing)
        os.close(self.reading)


def main() -> None:
    """Serve requests from stdin to stdout until stdin closes.

    The first line written is `"ready"`, or the text of the error if math-verify cannot be imported.
    """
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
    with contextlib.suppress(BrokenPipeError, EOFError):  # the trainer is gone
        _supervise(requests, replies)


def _warm_up() -> None:
    """Import math-verify and build its expressions and grammar tables, once for all children."""
    for text in (
        r"The answer is $\frac{1}{2}+\sqrt{3}$",
        "<answer> 12.5 </answer>",
        "so 3*(4+5) = 27",
    ):
        equal(text, "1/2")
        read_answer(text)


def equal(output: str, solution: str) -> bool:
    """Return math-verify's verdict, with R1-V's order of arguments.

    math-verify's own time limits are off, since they use the signal that the child's timer uses.
    """
    # Imported here, so that its absence can be reported to the trainer.
    from math_verify import parse, verify

    answer, gold = parse(output, parsing_timeout=None), parse(solution, parsing_timeout=None)
    return bool(verify(answer, gold, timeout_seconds=None))


def read_answer(output: str) -> str | None:
    """Return the first expression that math-verify reads in the output, as text, or None."""
    from math_verify import parse

    found = parse(output, parsing_timeout=None)
    text = str(found[0]) if found else None
    return text if text is None or len(text) <= MAX_ANSWER_CHARS else None


def _supervise(requests: BinaryIO, replies: BinaryIO) -> None:
    """Pass requests and replies on, and reply in place of a child that dies: the zygote's loop."""
    child = _Child(requests, replies)
    try:
        while line := requests.readline():
            for _ in range(2):
                reply = child.ask(line)
                if reply.endswith(b"\n"):
                    break
                cause, reply = child.end(), b"null\n"
                child = _Child(requests, replies)
                # A request that took too long is not tried again. One during which the child died
                # of something else, such as the out-of-memory killer, may not have been the cause.
                if cause == signal.SIGALRM:
                    break
            _write(replies, reply.removeprefix(LAST))
            if reply.startswith(LAST) or child.served == REQUESTS_PER_CHILD:
                child.end()
                child = _Child(requests, replies)
    finally:
        # Not left to the child: one that was stopped right after the fork has not yet asked to die
        # with the zygote.
        child.end()


class _Child:
    """A forked process that answers requests one at a time."""

    def __init__(self, requests: BinaryIO, replies: BinaryIO) -> None:
        self.served, self.is_late = 0, False
        from_us, to_child = os.pipe()
        from_child, to_us = os.pipe()
        zygote = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            try:
                _die_with(zygote)
                # A copy of the zygote's end would keep the pipe open after the zygote has died.
                for descriptor in (to_child, from_child, requests.fileno(), replies.fileno()):
                    os.close(descriptor)
                _serve(os.fdopen(from_us, "rb"), os.fdopen(to_us, "wb"))
            finally:
                os._exit(0)  # never return into the zygote's loop, whatever was raised
        os.close(from_us)
        os.close(to_us)
        self.channel = Channel(to_child, from_child, watched=requests.fileno())

    def ask(self, line: bytes) -> bytes:
        """Pass a request on and return the reply line.

        It is cut short or empty if the child dies first, or is late.
        """
        self.served += 1
        try:
            return self.channel.ask(line, json.loads(line)[2] + LATE_SECONDS)
        except TimeoutError:
            self.is_late = True
            return b""

    def end(self) -> int:
        """Kill the process, wait for it, close its pipes, and return the signal that ended it.

        That of one that was late is its timer's.
        """
        os.kill(self.pid, signal.SIGKILL)  # without effect if it is already dead
        _, status = os.waitpid(self.pid, 0)
        self.channel.close()
        return signal.SIGALRM if self.is_late else os.WTERMSIG(status)


def _die_with(parent: int) -> None:
    """Let this process be killed when its parent ends, where the system can do that."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(PARENT_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:  # it has ended already
        os._exit(0)


def _serve(requests: BinaryIO, replies: BinaryIO) -> None:
    """Limit what this process may use and do, then reply until the pipe closes: the child's loop.

    A child asks to be replaced by LAST. If it left by itself, a request on its way could be lost.
    """
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    # The default action ends the process even inside a C call.
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    sys.dont_write_bytecode = True
    sys.addaudithook(_refuse)
    while line := requests.readline():
        output, solution, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, max(seconds, 1e-3))  # 0 would mean: never
        try:
            reply = read_answer(output) if solution is None else equal(output, solution)
        except Exception:
            # MemoryError, RecursionError and others: an unreadable answer is not right.
            reply = None
        signal.setitimer(signal.ITIMER_REAL, 0)
        grown = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > PEAK_KIB
        _write(replies, (LAST if grown else b"") + json.dumps(reply).encode() + b"\n")


def _refuse(event: str, arguments: tuple) -> None:
    """Refuse commands, network connections and changes of files, as an audit hook."""
    writes = (
        event == "open"
        and isinstance(arguments[2], int)
        and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT)
    )
    if event in BLOCKED_EVENTS or writes:
        raise PermissionError(event)


def _write(file: BinaryIO, line: bytes) -> None:
    """Write a line at once."""
    file.write(line)
    file.flush()


if __name__ == "__main__":
    main()
