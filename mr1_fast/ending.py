"""How all processes of a run end when one of them fails.

torchrun then ends the others by SIGTERM, or their exchange with it breaks off; all of them would
print something. So the process that fails claims the end in the store where they have met, and
prints its sentence; the others print nothing. The store lives in torchrun itself, so that it
outlasts each of them.

Nothing here imports torch until a process fails, or waits for the others to begin.
"""

import json
import os
import signal
import sys
import time
from contextlib import suppress
from datetime import timedelta
from functools import cache
from typing import Any, NoReturn

from .torchrun import is_first, local_rank, machines, place, rank, size, unreachable

EARLY = 20.0
"""Seconds that the first process stays when it cannot begin, so that others can look into the store
why. Those that cannot begin either leave it to the first one to say so."""
SILENT = 5.0
"""Seconds that a process with nothing to say waits for torchrun to end it. One that ends itself
would be in torchrun's list of failures."""
ALONE = 1.0
"""The same for one that ends since a process on another machine has failed, which this machine's
torchrun does not know."""
LINGER = 5.0
"""Seconds that the store is kept for processes on other machines which fail at the same moment."""
NOTICED = 0.5
"""Seconds within which a process has noticed that the one which it watches has died."""
CLAIM = "the end"
"""Key of the store under which the first process that fails leaves its words."""
BROKEN = (
    *("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe"),
    *("remote process exited", "ncclRemoteError", "failed to recv, got 0 bytes"),
    "socket has timed out",
)
"""What the errors of gloo, NCCL and the store say when another process has ended."""

_met: list[Any] = []
"""The store of this start, once the processes have met there."""
_told: list[int] = []
"""The signals that this process has got."""
_lost: list[str] = []
"""What broke the connection to the process that this one watches, once that has died."""


def told_to_end(number: int) -> None:
    """Note a signal; SIGTERM may be torchrun's, because another process has ended."""
    _told.append(number)


def met_at(store: Any) -> None:
    """Note the store where the processes have met."""
    _met[:] = [store]


def by_torchrun(number: int) -> str:
    """Return what is added to "stopped" while it is unknown whether another process has died."""
    if size() == 1 or number != signal.SIGTERM or _met:
        return ""
    return " (by torchrun, which was told to end, or has lost a process)"


def lost_another(reason: str) -> None:
    """Note that the process which this one watches has died without a word."""
    _lost.append(reason)


def tell_all(word: str) -> None:
    """Leave a word in the store for all processes, which need not look for it."""
    if _met:
        with suppress(Exception):  # a store that is gone is told by whoever needs it
            _met[0].set(word, "")


def was_told(word: str) -> bool:
    """Return whether any process has left this word for all."""
    with suppress(Exception):
        return bool(_met) and _met[0].check([word])
    return False


def end_if_another_has() -> None:
    """End this process, which waits for the others to begin, if one has failed before it could."""
    with suppress(Exception):
        store = _early_store()
        if store.check([CLAIM]):
            _leave_word(store.get(CLAIM).decode().partition("\n")[2])
            _wait_for_torchrun(1, ALONE)


def says_another_ended(error: BaseException) -> bool:
    """Return whether an error only says that the exchange with another process broke off."""
    # torch raises RuntimeError and its kinds; a download that breaks off is another error.
    return isinstance(error, RuntimeError) and any(words in str(error) for words in BROKEN)


def fail_together(status: int, words: str, error: BaseException) -> NoReturn:
    """End this process with `status`, after its words have been printed by one of all processes.

    `words` are what the user is told of `error`. They are not printed where another process has
    failed before. Where the error only says that another one has ended, so does one sentence.
    """
    with suppress(ValueError):  # only the main thread may set handlers
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, lambda number, frame: told_to_end(number))
    stopped = isinstance(error, KeyboardInterrupt)
    if stopped:
        words += by_torchrun(status - 128)
    if "torch" not in sys.modules:  # the settings: every process reads the same
        if stopped and not is_first():
            _exit(status)
        _end_early(status, words, stays=not stopped)
    lost = str(error) if says_another_ended(error) else ""
    if stopped and _met and signal.SIGTERM in _told:
        lost = _loss_before_sigterm()
    if lost:
        line = lost.splitlines()[0].rpartition("] ")[2].partition(". ")[0]
        words = (
            f"error: {place()} has lost another one, which was killed or has died ({line}): "
            "start again with --resume, or let torchrun do so with --max-restarts and "
            "--resume auto."
        )
    claimed = _claim(words, if_gone=not lost)
    if claimed:
        _say(words)
    if claimed and not lost:
        _leave_word(words)
        if machines() > 1:
            time.sleep(LINGER)
    else:
        _wait_for_torchrun(status, 0.0 if stopped else SILENT)
    _exit(status)


def _loss_before_sigterm() -> str:
    """Return what this process has noticed of one that has died, because of which torchrun ends it.

    It is "" where there is nothing. Who does not watch the dead process waits until the one that
    does has said so.
    """
    entered = time.monotonic()
    while time.monotonic() < entered + 2 * NOTICED:
        if _lost and time.monotonic() < entered + NOTICED:
            return _lost[0]
        time.sleep(0.02)
    return ""


def _end_early(status: int, words: str, stays: bool) -> NoReturn:
    """End a process that cannot begin: the first one says why, as soon as it knows.

    It `stays` for those on other machines, unless the user has stopped them all.
    """
    if is_first():
        _say(words)
        _leave_word(words)
        if machines() > 1 and _claim(words) and stays:
            time.sleep(EARLY)
        _exit(status)
    if os.environ.get("GROUP_RANK", "0") == "0":  # on the machine of the first one
        _wait_for_torchrun(status, 2 * EARLY, then_exit=False)
    else:
        with suppress(Exception):  # nobody has claimed it, or nobody can any more
            _store().wait([CLAIM], timedelta(seconds=EARLY))
    if _claim(words):
        _say(words)
        _leave_word(words)
        if machines() > 1:
            time.sleep(LINGER)
    _exit(status)


def _claim(words: str, if_gone: bool = True) -> bool:
    """Return whether this process is the first to fail, which then has to say so.

    It is `if_gone` where the store is gone, since the machine that had it has ended.
    """
    mine = f"{rank()}\n{words}"
    try:
        found = _store().compare_set(CLAIM, "", mine).decode()
    except Exception:  # whatever the store's error is, this process is about to end
        _leave_word(words)
        return if_gone and local_rank() == 0
    if found == mine:
        return True
    found = found.partition("\n")[2]
    if not _met and machines() > 1:
        # Machines count restarts each for itself, so that it may be of an earlier start.
        return found != words and signal.SIGTERM not in _told
    _leave_word(found)
    return False


def _store() -> Any:
    """Return the store where the processes have met, or else the one where they would have."""
    return _met[0] if _met else _early_store()


@cache
def _early_store() -> Any:
    """Return the store of torchrun, which is there before the processes have met."""
    from torch.distributed import PrefixStore, TCPStore

    if problem := unreachable():  # torch would print a page of C++ about it
        raise ConnectionError(problem)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = TCPStore(address, port, timeout=timedelta(seconds=LINGER), wait_for_workers=False)
    return PrefixStore(f"start-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _say(words: str) -> None:
    """Print words on stderr, whatever state it is in."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
        print(words, file=sys.stderr, flush=True)


def _leave_word(words: str) -> None:
    """Leave words for the summary that torchrun prints at its end."""
    if path := os.environ.get("TORCHELASTIC_ERROR_FILE"):
        extra = {"py_callstack": words, "timestamp": str(int(time.time()))}
        with suppress(OSError), open(path, "w") as file:
            json.dump({"message": {"message": words, "extraInfo": extra}}, file)


def _wait_for_torchrun(status: int, seconds: float, then_exit: bool = True) -> None:
    """Wait until torchrun ends this process, which it does when another one on its machine has."""
    end = time.monotonic() + seconds
    while signal.SIGTERM not in _told and time.monotonic() < end:
        time.sleep(0.05)
    if signal.SIGTERM in _told:
        _exit(0)  # torchrun lists any other status as a failure of its own
    if then_exit:
        _exit(status)


def _exit(status: int) -> NoReturn:
    """End the process at once: its threads and connections may wait for others for ever."""
    with suppress(OSError, ValueError):
        sys.stdout.flush()
    os._exit(status)
