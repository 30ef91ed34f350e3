"""What runs below a process, and whether something still runs, by /proc."""

import time
from pathlib import Path


def children(pid: int) -> list[int]:
    """Return the processes that a process's first thread has started, and that are not reaped."""
    return [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


def is_running(pid: int | str) -> bool:
    """Return whether a process runs; a zombie does not."""
    try:
        return "\nState:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except OSError:
        return False


def only_child(pid: int, seconds: float = 10) -> int:
    """Return the one child of a process, once it has started it, within some seconds."""
    deadline = time.monotonic() + seconds
    while not (found := children(pid)):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    (child,) = found
    return child
