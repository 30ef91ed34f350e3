"""What torchrun tells a process about itself, and how all processes end when one of them fails.

A run has one process for each GPU. When one fails, torchrun ends the others by SIGTERM, or their
exchange with it breaks off; all of them would print something. So the process that fails claims the
end in the store where they have met, and prints its sentence; the others print nothing. The
store lives in torchrun itself, so that it outlasts each of them.

Nothing here imports torch until a process fails.
"""

import json
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from datetime import timedelta
from typing import Any, NoReturn

NAMES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT"),
)
"""Environment variables that say which of several processes this one is."""
EARLY = 20.0
"""Seconds that a process which cannot begin leaves the first one to say why, which it finds, too:
torchrun ends this one as soon as that has ended."""
SILENT = 5.0
"""Seconds that a process with nothing to say waits for torchrun to end it. One that ends itself
would be in torchrun's list of failures."""
LINGER = 5.0
"""Seconds that the store is kept for processes on other machines which fail at the same moment."""
CLAIM = "the end"
"""Key of the store under which the first process that fails leaves its words."""
BROKEN = (
    *("Connection closed by peer", "Connection reset by peer", "Connection refused", "Broken pipe"),
    *("remote process exited", "ncclRemoteError", "failed to recv, got 0 bytes"),
)
"""What the errors of gloo, NCCL and the store say when another process has ended."""

_met: list[Any] = []
"""The store of this start, once the processes have met there."""
_told: list[int] = []
"""The signals that this process has got."""


# --- who this process is ------------------------------------------------------------------------


def size() -> int:
    """Return how many processes torchrun has started for the run; 1 without torchrun."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def passes_signals_on() -> bool:
    """Return whether a signal may come a second time, from torchrun, which has got it, too."""
    return "TORCHELASTIC_RUN_ID" in os.environ or size() > 1


def rank() -> int:
    """Return the number of this process among all of them, from 0 on."""
    return int(os.environ["RANK"]) if size() > 1 else 0


def is_first() -> bool:
    """Return whether this is the process that prints and writes, or the only one."""
    return rank() == 0


def local_rank() -> int:
    """Return the number of this process on its machine, which is that of its GPU."""
    return int(os.environ.get("LOCAL_RANK", rank())) if size() > 1 else 0


def local_size() -> int:
    """Return how many of the processes are on this machine."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", size())) if size() > 1 else 1


def place() -> str:
    """Name this process in words."""
    return f"process {rank()} of {size()} on {socket.gethostname()}"


def leave_to_first() -> None:
    """End all processes but the first, which goes on as if it were alone.

    That is for commands which have nothing to share out.
    """
    if not is_first():
        sys.exit(0)
    for name in NAMES:
        os.environ.pop(name, None)


# --- the end of all -----------------------------------------------------------------------------


def told_to_end(number: int) -> None:
    """Note a signal; SIGTERM may be torchrun's, because another process has ended."""
    _told.append(number)


def met_at(store: Any) -> None:
    """Note the store where the processes have met."""
    _met[:] = [store]


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
    if "torch" not in sys.modules:  # the settings: every process reads the same
        if stopped and not is_first():
            _exit(status)
        _end_early(status, words)
    lost = says_another_ended(error)
    if lost:
        line = str(error).splitlines()[0].rpartition("] ")[2].partition(". ")[0]
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
        if _machines() > 1:
            time.sleep(LINGER)
    else:
        _wait_for_torchrun(status, 0.0 if stopped else SILENT)
    _exit(status)


def _end_early(status: int, words: str) -> NoReturn:
    """End a process that cannot begin: the first one says why, as soon as it knows."""
    if is_first():
        _say(words)
        _leave_word(words)
        if _machines() > 1 and _claim(words):
            time.sleep(LINGER)
        _exit(status)
    if os.environ.get("GROUP_RANK", "0") == "0":  # on the machine of the first one
        _wait_for_torchrun(status, EARLY, then_exit=False)
    else:
        with suppress(Exception):  # nobody has claimed it, or nobody can any more
            _store().wait([CLAIM], timedelta(seconds=EARLY))
    if _claim(words):
        _say(words)
        _leave_word(words)
    _exit(status)


def _claim(words: str, if_gone: bool = True) -> bool:
    """Return whether this process is the first to fail, which then has to say so.

    It is `if_gone` where the store is gone, since the machine that had it has ended.
    """
    mine = f"{rank()}\n{words}"
    try:
        found = _store().compare_set(CLAIM, "", mine).decode()
    except Exception:  # whatever the store's error is, this process is about to end
        return if_gone
    if found == mine:
        return True
    found = found.partition("\n")[2]
    if not _met and _machines() > 1:
        # Machines count restarts each for itself, so that it may be of an earlier start.
        return found != words
    _leave_word(found)
    return False


def _store() -> Any:
    """Return the store where the processes have met, or else the one where they would have."""
    if _met:
        return _met[0]
    from torch.distributed import PrefixStore, TCPStore

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


def _wait_for_torchrun(status: int, seconds: float = SILENT, then_exit: bool = True) -> None:
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


def _machines() -> int:
    return int(os.environ.get("GROUP_WORLD_SIZE", "1"))
