"""Which of the processes that torchrun has started this one is; one alone without torchrun.

A run has one process for each GPU. Nothing here imports torch.
"""

import os
import socket
import sys

NAMES = (
    *("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "GROUP_RANK", "GROUP_WORLD_SIZE"),
    *("MASTER_ADDR", "MASTER_PORT"),
)
"""Environment variables that say which of several processes this one is."""


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


def unreachable() -> str:
    """Return what is wrong with the connection to the store that torchrun keeps; "" for nothing."""
    address, port = os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]
    try:
        socket.create_connection((address, int(port)), timeout=5).close()
    except OSError as error:
        return f"{address}:{port}: {error.strerror or error}"
    return ""


def leave_to_first() -> None:
    """End all processes but the first, which goes on as if it were alone.

    That is for commands which have nothing to share out.
    """
    if not is_first():
        sys.exit(0)
    for name in NAMES:
        os.environ.pop(name, None)


def machines() -> int:
    """Return how many machines the processes are on."""
    return int(os.environ.get("GROUP_WORLD_SIZE", "1"))
