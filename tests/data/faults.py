"""Faults at a chosen call of the C library, in forks of a process that has imported everything.

    prepared(work, argument)            # of gang.py: work(argument) where faults.c is preloaded

In `work`, `forked(operate, folder, fault)` runs `operate()` in a fork, where the fault hits the
calls that change what is below the folder.
"""

import ctypes
import os
import shutil
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path

import pytest

SOURCE = Path(__file__).with_suffix(".c")
WRITES, MAKES, OTHERS = 1, 2, 4
"""Kinds of calls: those that write bytes; that make, size or rename; and all others."""
ALL = WRITES | MAKES | OTHERS
HOW = {"nothing": 0, "signal": 1, "fail": 2, "short": 3, "half, then signal": 4}

needs_gcc = pytest.mark.skipif(shutil.which("gcc") is None, reason="gcc builds what makes faults")


@dataclass(frozen=True)
class Fault:
    """What goes wrong at the `at`-th call of some kinds, counted from 1; 0 stands for nothing."""

    at: int = 0
    how: str = "nothing"
    value: int = 0
    """The number of the signal, or the errno."""
    kinds: int = ALL
    lasting: bool = False
    """Whether all later calls fail as well, as on a disk that is full."""


@dataclass(frozen=True)
class Call:
    """A call that was seen."""

    name: str
    kind: int
    size: int
    """Bytes that were to be written; 0 for a call that writes none."""
    path: str
    """Its file or folder, below the folder that is watched."""


@dataclass(frozen=True)
class Outcome:
    """How a fork has ended."""

    status: int
    """The exit status, or −n of signal n."""
    said: str
    """What it has printed."""
    calls: list[Call]


@lru_cache
def library() -> str | None:
    """Build the library, once in a process; None where there is no gcc."""
    if shutil.which("gcc") is None:
        return None
    built = Path(tempfile.mkdtemp(prefix="faults-")) / "faults.so"
    command = ["gcc", "-shared", "-fPIC", "-O1", "-Wall", "-Werror", "-o", built, SOURCE, "-ldl"]
    subprocess.run(command, check=True)
    return str(built)


@contextmanager
def preloaded() -> Iterator[None]:
    """Let processes that are started in this context have the library, if it can be built."""
    with pytest.MonkeyPatch.context() as patch:
        if library():
            patch.setenv("LD_PRELOAD", library(), prepend=":")
        yield


def forked(operate: Callable[[], object], folder: Path, fault: Fault = Fault()) -> Outcome:
    """Run `operate` as a command's main in a fork, with a fault at a call below `folder`."""
    with tempfile.TemporaryDirectory() as scratch:
        log, said = Path(scratch, "log"), Path(scratch, "said")
        sys.stdout.flush(), sys.stderr.flush()
        child = os.fork()
        if not child:
            _run(operate, folder, fault, log, said)
        _, status = os.waitpid(child, 0)
        calls = [line.split(" ", 3) for line in log.read_text(errors="replace").splitlines()]
        return Outcome(
            os.waitstatus_to_exitcode(status),
            said.read_text(errors="replace"),
            [Call(name, int(kind), int(size), path) for name, kind, size, path in calls],
        )


def _run(operate: Callable, folder: Path, fault: Fault, log: Path, said: Path) -> None:
    """Run `operate` and end this process, which is a fork, with the status of a command."""
    from mr1_fast.errors import exit_on_user_error

    status = 1
    try:
        for path, *streams in ((said, 1, 2), (log, 100)):
            opened = os.open(path, os.O_CREAT | os.O_APPEND | os.O_WRONLY)
            for stream in streams:
                os.dup2(opened, stream)
        sys.stdout = open(1, "w", closefd=False)  # noqa: SIM115
        sys.stderr = open(2, "w", closefd=False, errors="backslashreplace")  # noqa: SIM115
        arm = ctypes.CDLL(None).faults_arm
        arm.argtypes = [ctypes.c_char_p, ctypes.c_long, *[ctypes.c_int] * 5]

        def armed() -> None:
            arm(os.fsencode(folder), fault.at, fault.kinds, HOW[fault.how], *rest)
            operate()

        rest = (fault.value, int(fault.lasting), 100)
        exit_on_user_error(armed)
        status = 0
    except SystemExit as end:
        status = end.code if isinstance(end.code, int) else int(end.code is not None)
    except BaseException:
        traceback.print_exc()
    finally:
        ctypes.CDLL(None).faults_disarm()
        sys.stdout.flush(), sys.stderr.flush()
        os._exit(status)


# --- file systems -------------------------------------------------------------------------------


MS_RDONLY, MS_REMOUNT, MS_BIND, MS_PRIVATE = 1, 32, 4096, 1 << 18
CLONE_NEWNS, MS_REC = 0x20000, 16384


def own_mounts() -> bool:
    """Give this process mounts of its own; False where that is not allowed."""
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.unshare(CLONE_NEWNS):
        return False
    return not libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None)


def mount(kind: str, folder: Path, flags: int = 0, options: str = "") -> None:
    """Mount a file system, or a folder onto itself, for this process and its forks alone."""
    libc, place = ctypes.CDLL(None, use_errno=True), os.fsencode(folder)
    libc.mount.argtypes = [*[ctypes.c_char_p] * 3, ctypes.c_ulong, ctypes.c_char_p]
    if libc.mount(place, place, kind.encode(), flags, options.encode()):
        raise OSError(ctypes.get_errno(), f"mount of {folder}")


def small_disk(folder: Path, size: str, again: bool = False) -> None:
    """Put a file system of a size such as `8m` at `folder`, or give it another size."""
    folder.mkdir(exist_ok=True)
    mount("tmpfs", folder, MS_REMOUNT if again else 0, f"size={size}")


@contextmanager
def read_only(folder: Path) -> Iterator[None]:
    """Let nothing be written below a folder within a block, not even by root."""
    mount("", folder, MS_BIND)
    mount("", folder, MS_BIND | MS_REMOUNT | MS_RDONLY)
    yield
    ctypes.CDLL(None).umount2(os.fsencode(folder), 2)
