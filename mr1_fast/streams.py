"""Standard input, output and error of a command, which must not end the work that it does.

Its output may go to a terminal that knows ASCII alone, to a pipe whose reader has left, to a full
disk, or nowhere, where a descriptor is closed. What cannot be written is dropped, and the work goes
on.
"""

import io
import os
import sys
from errno import EPIPE
from typing import TextIO


class _Output(io.FileIO):
    """A descriptor that is written to until that fails; what follows is dropped."""

    lost: OSError | None = None
    """Why nothing is written any more."""

    def write(self, content: bytes) -> int:
        """Write some of the bytes, and return how many; all of them once they are lost."""
        if self.lost is None:
            try:
                written = super().write(content)
                return len(content) if written is None else written  # None: a full, impatient pipe
            except OSError as error:
                self.lost = error
        return len(content)


def prepare() -> None:
    """Make the streams of this process usable, whatever it was started with.

    A stream that something else has replaced already stays as it is.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:  # closed: the next file that is opened would take its place
            os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)
    if sys.stdout is sys.__stdout__:
        sys.stdout = _output(sys.stdout, 1)
    if sys.stderr is sys.__stderr__:
        sys.stderr = _output(sys.stderr, 2)


def _output(stream: TextIO | None, descriptor: int) -> TextIO:
    """Return a stream in the place of one that Python has opened, or could not open."""
    if stream is not None:
        stream.flush()
    return io.TextIOWrapper(
        io.BufferedWriter(_Output(descriptor, "w", closefd=False)),
        encoding=getattr(stream, "encoding", "utf-8"),
        errors="backslashreplace",
        line_buffering=getattr(stream, "line_buffering", False),
        write_through=getattr(stream, "write_through", False),
    )


def lost_output() -> str:
    """Say why standard output is not whole; "" if it is, or if its reader wanted no more of it."""
    sys.stdout.flush()
    lost = getattr(getattr(sys.stdout.buffer, "raw", None), "lost", None)
    return "" if lost is None or lost.errno == EPIPE else str(lost.strerror)
