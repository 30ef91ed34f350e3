"""When a run ends before its last step: a signal, or the time that it was given."""

import math
import os
import signal
import time
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from importlib.util import find_spec
from pathlib import Path
from types import FrameType

from . import ending, torchrun
from .errors import SignalHandling, Stopped, UserError

RECENT = 20
"""Of how many of the last steps the longest says how long the next one may take."""
SAME = 3.0
"""Seconds within which several signals are one under torchrun: Ctrl-C reaches its processes from
the terminal, and torchrun passes it on to them."""
STOPPING = "stopping"
"""What a process with a signal leaves for the others, which may be in the middle of long work."""
NOTED = "\nstopping: what has begun is finished and saved; a second signal stops at once\n"


class StopSignals:
    """Ctrl-C and SIGTERM, as a request that training looks at between its steps.

    A context manager. Within it a signal raises Stopped, since nothing is lost while a run is
    loaded. After `defer`, the first one is only noted in `received`, and the second one raises
    Stopped at once. Outside the main thread, signals are left alone.
    """

    def __init__(self) -> None:
        self.received = 0
        """The number of the last signal that this process got; 0 if there was none."""
        self.agreed = 0
        """That of all processes, as of the last time that they have agreed on it."""
        self._deferred = False
        self._first = 0.0
        self._noted = NOTED.encode()
        self._way_on: Callable[[], str] = lambda: "nothing was written"
        self._handling = SignalHandling(self._note)

    def defer(self, way_on: Callable[[], str]) -> None:
        """Only note the first signal from now on; `way_on()` says how a stopped run goes on."""
        self._noted = (NOTED + torchruns_limit()).encode()  # a signal handler must be quick
        self._deferred, self._way_on = True, way_on

    def agree(self, most: Callable[[float], float]) -> int:
        """Return the number of a signal that any process has got; 0 if none has.

        `most` is that of the World: signals reach processes at different moments, so that what all
        of them do after one must follow from what they have agreed on.
        """
        self.agreed = int(most(self.received))
        return self.agreed

    def is_told(self) -> bool:
        """Return whether this process has got a signal, or another has, and said so by this call.

        It is not collective: what all do must follow from what they agree on.
        """
        if self.received:
            ending.tell_all(STOPPING)
        return bool(self.received) or ending.was_told(STOPPING)

    def stopped(self, where: str, at_once: bool = False) -> Stopped:
        """Return the exception that ends the run, which says how to go on."""
        number = self.received or self.agreed
        return Stopped(number, f"stopped {where}: {self._way_on()}", at_once)

    def __enter__(self) -> "StopSignals":
        self._handling.__enter__()
        return self

    def __exit__(self, kind: object, error: BaseException | None, traceback: object) -> None:
        self._handling.__exit__(kind, error, traceback)
        # Ctrl-C reaches every process of the terminal: one that a step waits for, such as a
        # compiler or a program that a reward calls, may die of it, and the step then fails.
        # torchrun sends one where another process has ended, and that has a reason of its own.
        another = error is not None and ending.says_another_ended(error)
        if self.received and isinstance(error, Exception) and not another:
            reason = " ".join(str(error).split()).removesuffix(".")
            raise self.stopped(f"as {type(error).__name__} came up ({reason})") from error
        if isinstance(error, SystemExit):  # a scheduler would take status 0 for success
            raise UserError(
                f"something that the run calls, such as a reward or a logger, has called "
                f"sys.exit({error.code!r}): remove that; {self._way_on()}."
            ) from error
        if isinstance(error, KeyboardInterrupt) and not isinstance(error, Stopped):
            raise Stopped(signal.SIGINT, f"stopped: {self._way_on()}") from error
        if self._deferred and isinstance(error, Exception):
            error.add_note(self._way_on())

    def _note(self, number: int, frame: FrameType | None) -> None:
        ending.told_to_end(number)
        now, again = time.monotonic(), bool(self.received)
        if again and torchrun.passes_signals_on() and now - self._first < SAME:
            return
        self.received, self._first = number, now
        if not self._deferred:
            raise self.stopped("while loading")
        if again:
            raise self.stopped("at once", at_once=True)
        # Of several processes, SIGTERM may only say that another one has ended.
        if torchrun.is_first() and (torchrun.size() == 1 or number == signal.SIGINT):
            with suppress(OSError):
                os.write(2, self._noted)  # print may be what the signal has interrupted


def torchruns_limit() -> str:
    """Say when torchrun kills its processes after a signal, as a line; "" without torchrun."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ""
    source = Path(find_spec("torch.distributed.run").origin).read_text("utf-8")
    # Versions of torch without the flag always wait for 30 s.
    unless = ", unless it was started with a longer --shutdown-timeout"
    unless = unless if "--shutdown-timeout" in source else ""
    return f"torchrun kills what is not done after 30 s{unless}\n"


class TimeLimit:
    """Says when a run must end to be over after `hours`, by how long its parts have taken so far.

    The parts are what `measure` names; `step` is one of them. With None there is no limit.
    """

    def __init__(self, hours: float | None = None):
        self.end = math.inf if hours is None else time.monotonic() + 3600 * hours
        self._seconds: dict[str, deque[float]] = defaultdict(lambda: deque(maxlen=RECENT))

    @contextmanager
    def measure(self, part: str) -> Iterator[None]:
        """Note how many seconds the block takes as those of `part`."""
        started = time.monotonic()
        yield
        self.note(part, time.monotonic() - started)

    def note(self, part: str, seconds: float) -> None:
        """Note how many seconds `part` has taken, or is thought to take."""
        self._seconds[part].append(seconds)

    def leaves(self, *parts: str) -> bool:
        """Say whether there is time for all parts, each as long as the longest of its last ones.

        Until a step has been measured there is always time: a run that is resumed again and again
        comes to its end, however short the limit. Any other part that was never measured counts as
        nothing.
        """
        if "step" not in self._seconds:
            return True
        needed = sum(max(self._seconds.get(part, ()), default=0.0) for part in parts)
        return time.monotonic() + needed <= self.end

    def must_learn(self, part: str) -> bool:
        """Say whether it matters how long `part` takes, and that is not known yet."""
        return self.end < math.inf and part not in self._seconds
