"""The time of one call on a GPU: between events, with a clean L2 and no host time inside.

Before the first event the GPU gets enough to do that the host has queued the whole call by the time
the GPU reaches it. Whether that held is known afterwards, as the first event must not have happened
when the host had queued the last. The host's own time for the call is measured apart.
"""

import time
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

FLUSH_BYTES = 512 * 2**20
"""Bytes read before each timed call: several times what any L2 cache holds."""
CYCLES = 3e9
"""Cycles a second of a waiting GPU, taken to be more than any has: the wait is never too short."""
LEAST_WAIT, MOST_WAIT = 0.002, 0.2
"""Seconds that the GPU waits before a call: at first, and at most."""
TRIES = 3
"""How often a case may be called again with a longer wait; one that waits for the GPU itself, or
queues more than the driver takes, cannot be hidden by any."""


class Seconds(NamedTuple):
    """The seconds of one call."""

    device: float
    """On a CPU by the wall clock."""
    host: float | None = None
    """Until the host had queued the call; None on a CPU."""
    hidden: bool = True
    """Whether the host had queued the call before the GPU began with it."""


def read(tensor: Tensor) -> Tensor:
    """Read every byte of a contiguous tensor, whose bytes are a multiple of 4, and write few."""
    if tensor.is_cuda:
        from read_triton import read as read_words  # here, as Triton exists for Linux alone

        return read_words(tensor.view(-1).view(torch.int32))
    return tensor.view(-1).view(torch.float32).sum()


def flush(device: str) -> None:
    """Replace the contents of L2 by clean lines.

    Lines that were written, as by a fill, would be written back during the timed call.
    """
    read(torch.empty(FLUSH_BYTES, dtype=torch.uint8, device=device))


def once(call: Callable[[], object], device: str, wait: float) -> Seconds:
    """Time one call; on a GPU, the GPU waits `wait` seconds before it."""
    if device == "cpu":
        start = time.perf_counter()
        call()
        return Seconds(time.perf_counter() - start)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    flush(device)
    torch.cuda._sleep(int(wait * CYCLES))
    begin.record()
    start = time.perf_counter()
    call()
    host = time.perf_counter() - start
    end.record()
    hidden = not begin.query()
    end.synchronize()
    return Seconds(begin.elapsed_time(end) / 1000, host, hidden)


class Stopwatch:
    """Times the calls of one case, and learns how long the GPU has to wait before each."""

    def __init__(self, device: str):
        self.device, self.wait, self.tries = device, LEAST_WAIT, TRIES

    def __call__(self, restore: Callable[[], object], call: Callable[[], object]) -> Seconds:
        """Time `call` after `restore`, again with a longer wait while that may hide the host."""
        while True:
            restore()
            taken = once(call, self.device, self.wait)
            if taken.hidden or not self.tries or taken.host > MOST_WAIT:
                return taken
            self.tries -= 1
            self.wait = min(max(2 * self.wait, 2 * taken.host), MOST_WAIT)


def sm_clock(
    call: Callable[[], object], seconds: float, device: str, busy: float = 0.4
) -> int | None:
    """MHz of the multiprocessors while `call`, which takes `seconds`, runs for `busy` seconds.

    None on a CPU, and where the driver's library (nvidia-ml-py) is missing.
    """
    if device == "cpu":
        return None
    for _ in range(1 + int(busy / seconds)):
        call()
    time.sleep(busy / 2)
    try:
        return torch.cuda.clock_rate()
    except (ModuleNotFoundError, RuntimeError):
        return None
    finally:
        torch.cuda.synchronize()
