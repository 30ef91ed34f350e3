"""What ends a command: errors that are meant for the user, and the user's own wish to stop.

Text that is shown may be hostile, so what a terminal would obey is escaped. Of several processes
under torchrun, one says why all of them end (ending.py).
"""

import errno
import os
import signal
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from types import FrameType
from typing import TypeVar

from . import ending, streams, torchrun

Result = TypeVar("Result")
Handler = Callable[[int, FrameType | None], object]

STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)
"""Ctrl-C, and how a job scheduler or `kill` asks a process to end."""
LONGEST = 1000
"""The most characters of a message; what is named in it may be of any length."""
NO_MEMORY = "DefaultCPUAllocator: "
"""What torch's RuntimeError says where the memory of the machine has no room."""
WAYS_OUT = {
    (errno.ENOSPC, errno.EDQUOT, errno.EFBIG): "make room there",
    (errno.EACCES, errno.EPERM, errno.EROFS): "change its permissions, or name another place",
    (errno.EMFILE, errno.ENFILE): "raise the number of open files, by `ulimit -n`",
}
"""What helps against some of the errors of the system."""
AGAIN = 0.02
"""Seconds after which a stop that Python has dropped is raised again."""


def printable(text: str) -> str:
    """Return a text with its control characters escaped, which a terminal would obey.

    Line breaks stay. Data and model output may hold anything.
    """
    return "".join(
        each if each.isprintable() or each == "\n" else repr(each)[1:-1] for each in text
    )


def shortened(text: object, length: int = 80) -> str:
    """Return the start of a text for a message, in one line and without control characters."""
    text = str(text)
    text = text if len(text) <= length else f"{text[: length - 1]}…"
    return printable(text).replace("\n", "\\n")


class UserError(Exception):
    """Bad input; its message is one sentence that names the field or file and the way out.

    The names of columns and files may hold anything, so what a terminal would obey is escaped. Of
    a message that is too long, the beginning and the end stay, where the way out is.
    """

    def __init__(self, message: str):
        message = printable(message)
        if len(message) > LONGEST:
            end = LONGEST // 2
            message = f"{message[: LONGEST - end - 3]} … {message[-end:]}"
        super().__init__(message)


class Stopped(KeyboardInterrupt):
    """A signal has ended the work; the message says what was saved, and how to go on.

    `at_once`: it was the second one, so that nothing may be waited for.
    """

    def __init__(self, number: int, message: str = "stopped", at_once: bool = False):
        super().__init__(printable(message))
        self.number = number
        self.at_once = at_once

    def __reduce__(self) -> tuple:
        """Go whole to the other processes, which torch tells what has ended one of them."""
        return Stopped, (self.number, str(self), self.at_once)

    @property
    def status(self) -> int:
        """The exit status that shells give a process which a signal has ended."""
        return 128 + self.number


def stops_at_once(error: BaseException | None) -> bool:
    """Return whether a context that an error leaves must not wait for anything."""
    return isinstance(error, Stopped) and error.at_once


class SignalHandling:
    """Context manager under which `handler` gets the stop signals; afterwards all is as before.

    A signal that the process was started to ignore, as in the background of a script, stays
    ignored. Nothing happens outside the main thread, since Python allows no handlers there.

    The handler may raise Stopped. Python drops an exception that comes up in a destructor or in a
    callback of a weak reference, of which imports have many; it is raised again a moment later.
    """

    def __init__(self, handler: Handler):
        self.handler = handler
        self.before: dict[int, object] = {}
        self.dropped: Stopped | None = None
        self.report = sys.unraisablehook

    def __enter__(self) -> None:
        if threading.current_thread() is threading.main_thread():
            for number in STOP_SIGNALS:
                if signal.getsignal(number) not in (signal.SIG_IGN, None):
                    self.before[number] = signal.signal(number, self._handle)
        if self.before:
            self.report, sys.unraisablehook = sys.unraisablehook, self._note_dropped

    def __exit__(self, kind: object, error: BaseException | None, trace: object) -> None:
        dropped, self.dropped = self.dropped, None  # first: it is not sent again from here on
        if self.before:
            sys.unraisablehook = self.report
        for number, handler in self.before.items():
            signal.signal(number, handler)
        if dropped and not error:
            raise dropped

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.dropped:
            error, self.dropped = self.dropped, None
            raise error
        self.handler(number, frame)

    def _note_dropped(self, what: "sys.UnraisableHookArgs") -> None:
        if not isinstance(what.exc_value, Stopped):
            self.report(what)
            return
        self.dropped = what.exc_value
        again = threading.Timer(AGAIN, self._send_again)
        again.daemon = True
        again.start()

    def _send_again(self) -> None:
        if self.dropped:
            os.kill(os.getpid(), self.dropped.number)


def require_output() -> None:
    """Raise UserError where standard output, which a command is called for, could not be written.

    It is not an error that a reader such as `head` has seen enough.
    """
    if lost := streams.lost_output():
        raise UserError(f"standard output cannot be written ({lost}): send it somewhere else.")


def begin_command() -> None:
    """Prepare this process for a command: its streams, its signals, and the folder it works in."""
    streams.prepare()
    exit_when_stopped()
    exit_on_user_error(_require_folder)


def _require_folder() -> None:
    """Raise UserError where the current folder is gone, of which torch dies without a word."""
    try:
        os.getcwd()
    except FileNotFoundError as error:
        raise UserError("the current folder was deleted: change into another one.") from error


def exit_when_stopped() -> None:
    """Let the stop signals end this process at once, with one line on stderr.

    That is for a command that still imports its libraries, where an exception may come up in any of
    them and be lost or reported as another one, and for one that is about to exit.
    """
    SignalHandling(_exit).__enter__()


def _exit(number: int, frame: FrameType | None) -> None:
    if torchrun.is_first():
        with suppress(OSError):
            os.write(2, f"\nstopped{ending.by_torchrun(number)}\n".encode())
    os._exit(128 + number)


def exit_on_user_error(main: Callable[[], Result]) -> Result:
    """Return what `main` returns, or exit with one line on stderr if it does not come to its end.

    The status is 2 for a UserError and for what the system refuses, 130 after Ctrl-C, and 143 after
    SIGTERM; any other error is raised. Of several processes, the first to fail ends all of them
    with its line, or with a traceback that names it; it exits with the same status, and torchrun
    with 1.
    """

    raised: list[Stopped] = []

    def stop(number: int, frame: FrameType | None) -> None:
        ending.told_to_end(number)
        raised.append(Stopped(number))
        raise raised[-1]

    try:
        with SignalHandling(stop):
            result = main()
            # What ignores errors can lose a stop, as a library's shutil.rmtree does where it closes
            # a folder.
            if raised:
                raise raised[-1]
            return result
    except (Exception, KeyboardInterrupt) as raised_last:
        error = stop_behind(raised_last) or raised_last
        status, words = _ending(error)
        if torchrun.size() > 1:
            trace = f"{torchrun.place()}:\n{traceback.format_exc()}"
            ending.fail_together(status, words or printable(trace), error)
        if not words:
            raise
        if status > 128:
            exit_when_stopped()
        with suppress(OSError, ValueError):
            sys.stdout.flush()  # where both go to one file, these words are its last line
        print(words, file=sys.stderr)
        sys.exit(status)


def _ending(error: BaseException) -> tuple[int, str]:
    """Return the exit status of an error and what the user is told; "" where it is unexpected."""
    if isinstance(error, UserError):
        return 2, f"error: {error}"
    if isinstance(error, KeyboardInterrupt):
        return error.status if isinstance(error, Stopped) else 130, f"\n{str(error) or 'stopped'}"
    if reason := _refusal(error):
        notes = getattr(error, "__notes__", [])
        return 2, f"error: {'; '.join([reason, *notes])}."
    return 1, ""


def stop_behind(error: BaseException) -> Stopped | None:
    """Return the stop that an error has followed from, if there is one.

    A stop in the middle of a call such as shutil.rmtree makes that fail in its own way.
    """
    seen: set[int] = set()
    while error is not None and id(error) not in seen:
        if isinstance(error, Stopped):
            return error
        seen.add(id(error))
        error = error.__cause__ or error.__context__
    return None


def _refusal(error: BaseException) -> str:
    """Say what the system has refused, and the way out; "" for an error that is not of this kind.

    Libraries raise OSError for reasons of their own, too, which then has no number.
    """
    if isinstance(error, MemoryError) or NO_MEMORY in str(error):
        return "the memory of this machine is full: end other programs, or make the work smaller"
    if isinstance(error, RecursionError):
        return "something that was read is nested too deeply for Python: make it flatter"
    if not isinstance(error, OSError) or error.errno is None:
        return ""
    name = error.filename
    what = shortened(os.fsdecode(name), 300) if isinstance(name, str | bytes) else "a file"
    way_out = "check that path, and the disk or network that it is on"
    for numbers, words in WAYS_OUT.items():
        if error.errno in numbers:
            way_out = words
    return f"{what} cannot be used ({error.strerror}): {way_out}"
