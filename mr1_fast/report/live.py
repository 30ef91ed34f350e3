"""The report of a run that goes on: written again every minute by a process of its own.

Drawing the plots takes about a second of Python. A thread would share the interpreter with
training, and the loop itself would stand still; a process at the lowest priority takes what
training leaves. docs/configuration.md has the measurement.
"""

import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

from ..errors import stops_at_once
from ..processes import module_process
from .run_report import write_report

FIRST = 10.0
"""Seconds before the first page: a run that is over by then writes its last page alone."""
EVERY = 60.0
"""Seconds between two beginnings of a renewal."""
PATIENCE = 60.0
"""Seconds that `--open` waits for the first page."""
GRACE = 5.0
"""Seconds that a process gets to end when it is told to."""

_BROWSE = "import sys, webbrowser; sys.exit(not webbrowser.open(sys.argv[1]))"


class LivePage:
    """Context manager that keeps report.html of a run's folder up to date while the run goes on.

    Call `renew` after each step. The last page is written when the block ends, also by an error,
    but not by a second signal, after which nothing is waited for. At most one process writes at a
    time. Nothing here ever raises: what goes wrong is said once in a sentence, by `say`, and
    training goes on; later renewals are tried all the same.
    """

    def __init__(
        self,
        run: Path,
        say: Callable[[str], None],
        first: float = FIRST,
        every: float = EVERY,
    ):
        self.run, self.every = run, every
        self._say = say
        self._next = time.monotonic() + first
        self._writer: subprocess.Popen | None = None
        self._browser: subprocess.Popen | None = None
        self._said: set[str] = set()

    def __enter__(self) -> "LivePage":
        return self

    def __exit__(self, kind, error, traceback) -> None:
        if not stops_at_once(error):
            self.finish()
        elif self._writer is not None:
            self._writer.terminate()

    @property
    def path(self) -> Path:
        """The page."""
        return self.run / "report.html"

    def open(self) -> None:
        """Write the first page now, and show it in a browser as soon as it is there."""
        self._write()
        if self._writer is not None:
            with suppress(subprocess.TimeoutExpired):
                self._writer.wait(PATIENCE)
        self._collect()
        if not self.path.exists():
            return
        # A browser in the terminal would stop training until it is left, so it gets no terminal.
        command = [sys.executable, "-P", "-c", _BROWSE, self.path.resolve().as_uri()]
        self._browser = self._start(command, None, stderr=subprocess.DEVNULL)

    def renew(self) -> None:
        """Begin to write the page again if the last time was long enough ago; returns at once."""
        if self._writer is not None or self._browser is not None:
            self._collect()
        if self._writer is None and time.monotonic() >= self._next:
            self._write()

    def finish(self) -> None:
        """Write the last page, which no longer renews itself, once no other process writes it."""
        self._stop_writer()
        self._collect()
        try:
            write_report(self.run)
        except Exception as error:  # a page is not worth a run
            self._warn(f"the report could not be written: {error}")

    def _stop_writer(self) -> None:
        """End the process that is writing, which then removes what it has half written."""
        if self._writer is None:
            return
        for end in (self._writer.terminate, self._writer.kill):
            end()
            with suppress(subprocess.TimeoutExpired):
                self._writer.communicate(timeout=GRACE)
                break
        self._writer = None

    def _write(self) -> None:
        self._next = time.monotonic() + self.every
        command, environment = module_process("mr1_fast.report", str(self.run), "--live")
        self._writer = self._start(command, environment, stderr=subprocess.PIPE)

    def _start(
        self, command: list[str], environment: dict[str, str] | None, stderr: int
    ) -> subprocess.Popen | None:
        try:
            return subprocess.Popen(
                command,
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=stderr,
                env=environment,
                # Ctrl-C is for the run alone, which then writes its last page.
                start_new_session=True,
            )
        except OSError as error:
            self._warn(f"the report is not renewed: no process can be started ({error.strerror}).")
            return None

    def _collect(self) -> None:
        """Take notice of processes that have ended."""
        if self._writer is not None and self._writer.poll() is not None:
            said = self._writer.communicate()[1].decode(errors="replace").strip()
            if self._writer.returncode:
                reason = said.splitlines()[-1] if said else f"exit {self._writer.returncode}"
                self._warn(f"the report is not renewed: {reason.removeprefix('error: ')}")
            self._writer = None
        if self._browser is not None and self._browser.poll() is not None:
            if self._browser.returncode:
                self._warn(f"open: no browser was found here, so open {self.path} yourself.")
            self._browser = None

    def _warn(self, sentence: str) -> None:
        kind = sentence.partition(":")[0]
        if kind not in self._said:
            self._said.add(kind)
            self._say(sentence)
