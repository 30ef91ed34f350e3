"""A call whose time and memory are bounded, for what a file of somebody else makes a library do.

It is computed in a forked child, as PyTorch's DataLoader has them, and its result comes back as
JSON. No signal of Python's ends a call into C, such as a power of big integers or a regular
expression that backtracks; the limits of the operating system end the whole child.
"""

import faulthandler
import json
import os
import resource
import select
import signal
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

from .errors import STOP_SIGNALS

CPU_SECONDS = 5
"""The processor time that a call has; a child whose parent has died ends by it, too."""
WALL_SECONDS = 120.0
"""How long a call is waited for, on a machine that is busy with something else."""
MEMORY_BYTES = 1 << 30
"""What a call may allocate beyond what its process had."""
LONGEST_REPLY = 1 << 20
"""The most bytes of a result."""


class Refused(Exception):
    """A call that has raised, or was ended by a limit; the message says which."""


def bounded(work: Callable[[], Any], seconds: int = 0, memory: int = 0) -> Any:
    """Return what `work` returns, which must be JSON; nothing else that it does has an effect here.

    Raises Refused where it raises, or needs more than `seconds` of processor time or `memory` bytes
    beyond what its process had; they are CPU_SECONDS and MEMORY_BYTES unless they are given.
    """
    seconds, memory = seconds or CPU_SECONDS, memory or MEMORY_BYTES
    wall = WALL_SECONDS + 2 * (seconds - CPU_SECONDS)
    ours, theirs = os.pipe()
    # A handler of the parent's that raised in the child would let it go on with the parent's work.
    mask = signal.pthread_sigmask(signal.SIG_BLOCK, STOP_SIGNALS)
    child = os.fork()
    if not child:
        _child(work, theirs, seconds, memory, mask)
    signal.pthread_sigmask(signal.SIG_SETMASK, mask)
    os.close(theirs)
    try:
        reply = _read(ours, wall)
    finally:
        os.close(ours)
        with suppress(ProcessLookupError):
            os.kill(child, signal.SIGKILL)
        with suppress(ChildProcessError):  # where SIGCHLD is ignored, the system has reaped it
            os.waitpid(child, 0)
    if reply is None:
        raise Refused(f"it takes more than {wall:g} seconds, though little processor time")
    try:
        kind, value = json.loads(reply)
    except ValueError as error:
        raise Refused(
            f"it takes more than {seconds} seconds or {memory / 2**30:.2g} GiB, or crashes"
        ) from error
    if kind == "raised":
        raise Refused(value)
    return value


def _read(descriptor: int, wall: float) -> bytes | None:
    """Read a reply to its end; an incomplete one if it is too long, None after `wall` seconds."""
    end = time.monotonic() + wall
    poll = select.poll()
    poll.register(descriptor, select.POLLIN)
    reply = b""
    while len(reply) <= LONGEST_REPLY:
        if not poll.poll(max(0.0, end - time.monotonic()) * 1000):
            return None
        part = os.read(descriptor, 1 << 16)
        if not part:
            return reply
        reply += part
    return b""


def _child(
    work: Callable[[], Any],
    descriptor: int,
    seconds: int,
    memory: int,
    mask: set[signal.Signals],
) -> NoReturn:
    """Run `work` in the forked child, write its result or error, and end without any cleaning up.

    mask: the signals that were blocked before the fork; the stops are until this has handlers.

    What the parent has opened is the parent's to flush and to close.
    """
    try:
        signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the parent, which ends this
        signal.signal(signal.SIGTERM, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        quiet = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(quiet, stream)
        faulthandler.disable()  # a crash here is no crash of the command
        if torch := sys.modules.get("torch"):
            torch.set_num_threads(1)  # a child has none of the threads that OpenMP would wait for
        _limit(seconds, memory)
        try:
            reply = "done", work()
        except MemoryError:
            reply = "raised", f"it takes more than {memory / 2**30:.2g} GiB of memory"
        except BaseException as error:  # also the panics of a library in Rust
            lines = str(error).strip().splitlines()
            reply = "raised", f"{type(error).__name__}: {lines[0][:200] if lines else ''}"
        text = json.dumps(reply).encode()
        while text:
            text = text[os.write(descriptor, text) :]
    finally:
        os._exit(0)


def _limit(seconds: int, memory: int) -> None:
    """Set the limits of this process."""
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    resource.setrlimit(resource.RLIMIT_CPU, (seconds, seconds))
    with suppress(OSError, ValueError):  # Linux alone says how much a process has
        with open("/proc/self/statm", encoding="ascii") as file:
            pages = int(file.read().split()[0])
        most = pages * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
