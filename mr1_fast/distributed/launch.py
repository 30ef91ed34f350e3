"""How the processes that torchrun has started meet, make sure that they fit together, and part."""

import os
import socket
import threading
import time
from collections.abc import Callable, Mapping
from datetime import timedelta
from functools import cache
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
import torch.distributed as dist

from .. import ending, torchrun
from ..errors import UserError
from .optimizer_shards import all_gather, reduce_scatter
from .sharding import Sharding
from .world import SINGLE, World

WAIT = timedelta(hours=24)
"""How long a process waits for small values of the others. One that has died is noticed at once,
since its connections end; one that is alive may be downloading a model, make the supervised start
of a built-in one, or sample for a long time.

Gradients and weights have torch's own limit of ten minutes (NCCL), since all processes come to
these at once, after small values."""
MEETING = timedelta(minutes=10)
"""How long a process waits for the others to start."""
LONGER = 60.0
"""Seconds that the others wait longer than process 0, which can say who is missing."""
FINDING = 30.0
"""Seconds that a process looks for torchrun's store, which goes with the machine that has it."""
GRACE = 30.0
"""Seconds that a process has to end by itself after another one has ended. It cannot where it waits
for NCCL, which may not notice."""
FOR_EVER = timedelta(days=3650)
"""How long the watch for the end of another process may last: as long as any run."""
SEEN = 30.0
"""Seconds within which a shared file system must show a new file on all machines."""

_watch: list["Watch"] = []
"""The thread that watches the next process, while there are several."""


@cache
def join_world(device_type: str) -> World:
    """Join the processes that torchrun has started; the world of one where it has not.

    device_type: `cuda`, where gradients and weights go through NCCL, or `cpu`.
    """
    if torchrun.size() == 1:
        return SINGLE
    if device_type == "cuda":
        torch.cuda.set_device(torchrun.local_rank())
    if not dist.is_initialized():
        if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            _require_store()
        found = dist.rendezvous("env://", timeout=MEETING)
        store = meet(*next(found), ending.end_if_another_has)
        ending.met_at(store)
        dist.init_process_group(
            "nccl" if device_type == "cuda" else "gloo",
            store=dist.PrefixStore("world", store),
            rank=torchrun.rank(),
            world_size=torchrun.size(),
        )
        if dist.is_torchelastic_launched():
            _watch[:] = [Watch()]
        if device_type == "cuda":
            connect(torch.device("cuda"))
    return World(
        rank=torchrun.rank(),
        size=torchrun.size(),
        local_rank=torchrun.local_rank(),
        local_size=torchrun.local_size(),
        control=dist.new_group(backend="gloo", timeout=WAIT),
    )


def _require_store() -> None:
    """Raise UserError if torchrun's store is gone, which is there before it starts a process.

    torch would look for it for as long as processes may wait for one another, and hear no signal.
    """
    end = time.monotonic() + FINDING
    while problem := torchrun.unreachable():
        if time.monotonic() > end:
            raise UserError(
                f"the machine of process 0 cannot be reached, or has ended ({problem}): look at "
                "what is said there."
            )
        time.sleep(0.5)


def connect(device: torch.device) -> None:
    """Make every kind of collective call once that training makes on its device, small and large.

    NCCL connects the cards at the first call of each kind, and takes its buffers from the card
    itself. In the middle of a step torch's cache may have filled that, which NCCL cannot empty.
    """
    size = dist.get_world_size()
    for length in (1, Sharding.bucket // size):
        part = torch.zeros(length, device=device)
        whole = torch.zeros(size * length, device=device)
        dist.all_reduce(whole)
        dist.broadcast(whole, src=0)
        reduce_scatter(part, whole)
        all_gather(whole, part)
    if device.type == "cuda":
        torch.cuda.synchronize()
        del part, whole
        torch.cuda.empty_cache()


def work_alone(world: World) -> None:
    """Part from the other processes, which all do here: each then is alone for torch as well.

    transformers, for example, writes a model on the first process of a group only.
    """
    world.barrier()
    leave_world()
    if world.size > 1 and dist.is_initialized():  # leave_world does it under torchrun alone
        dist.destroy_process_group()


def leave_world() -> None:
    """End the exchange with the other processes, once all of them have come to their end."""
    if _watch:
        _watch.pop().end()
        dist.destroy_process_group()


def meet(
    store: dist.Store, rank: int, size: int, look: Callable[[], None] = lambda: None
) -> dist.Store:
    """Return the store of this start of all processes, which has nothing of an earlier one.

    torchrun keeps the store when it starts the processes again, and what it tells them does not
    number the starts alike on all machines. Rank 0 writes a fresh token; each other rank answers
    with its own and goes on once rank 0 has echoed it, which a token left by an earlier start never
    does. `look` is called again and again meanwhile. UserError where a process does not come.
    """
    mine, end = uuid4().hex, time.monotonic() + MEETING.total_seconds()
    if rank == 0:
        store.set("first", mine)
        words = [_read(store, f"{mine}/{other}", end, look) for other in range(1, size)]
        if "" in words:
            raise _missing(1 + words.index(""))
        for other, word in enumerate(words, 1):
            store.set(f"{mine}/heard/{other}", word)
        return dist.PrefixStore(mine, store)

    end += LONGER
    while time.monotonic() < end:
        # It may be that of an earlier start, which hears nothing.
        first = _read(store, "first", end, look)
        store.set(f"{first}/{rank}", mine)
        if _read(store, f"{first}/heard/{rank}", time.monotonic() + 0.5, look) == mine:
            return dist.PrefixStore(first, store)
    raise _missing(0)


def _missing(rank: int) -> UserError:
    minutes = MEETING.total_seconds() / 60
    return UserError(
        f"process {rank} has not begun within {minutes:g} minutes: look at what it says."
    )


def _read(store: dist.Store, key: str, end: float, look: Callable[[], None]) -> str:
    """Return what another process writes to the store, "" where it does not until the time `end`.

    A wait of the store would hold up signals, and print a warning when it is over.
    """
    while not store.check([key]):
        if time.monotonic() > end:
            return ""
        look()
        time.sleep(0.02)
    return store.get(key).decode()


class Watch:
    """A thread that ends this process some time after the next one has ended without a word.

    The next one's connection closes at once, wherever this process is at that moment.
    """

    def __init__(self) -> None:
        self.over = False
        self.group = dist.new_group(backend="gloo", timeout=FOR_EVER)
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self.thread = threading.Thread(target=self._wait, daemon=True)
        self.thread.start()

    def end(self) -> None:
        """Stop watching; all processes call it, and none ends before all have."""
        self.over = True
        dist.barrier(group=self.group)
        dist.send(torch.zeros(1), (self.rank - 1) % self.size, group=self.group)
        self.thread.join()

    def _wait(self) -> None:
        try:
            dist.recv(torch.zeros(1), (self.rank + 1) % self.size, group=self.group)
        except RuntimeError as error:
            if not self.over:
                ending.lost_another(str(error))
            time.sleep(GRACE)
            if not self.over:
                ending.fail_together(1, f"error: {error}", error)


def require_same(world: World, values: Mapping[str, Any], way_out: str) -> None:
    """Raise UserError, which ends with `way_out`, where the processes have different values."""
    mine = {name: repr(value) for name, value in values.items()}
    everywhere = world.gather((socket.gethostname(), mine))
    host, first = everywhere[0]
    for rank, (other_host, others) in enumerate(everywhere):
        for name, value in first.items():
            if others[name] != value:
                raise UserError(
                    f"{name} is {value} in process 0 on {host}, but {others[name]} in process "
                    f"{rank} on {other_host}: {way_out}."
                )


def require_shared(world: World, folder: Path) -> None:
    """Raise UserError where a process does not see what the first one writes to the run folder."""
    if world.size == 1:
        return
    mark = folder / world.of_first(f".seen-by-all-{uuid4().hex}")
    if world.is_first:
        mark.touch()
    world.barrier()

    deadline = time.monotonic() + SEEN
    while not mark.exists() and time.monotonic() < deadline:
        time.sleep(0.2)
        if folder.is_dir():
            list(folder.iterdir())  # makes NFS look again
    places = world.gather((socket.gethostname(), mark.exists()))
    if world.is_first:
        mark.unlink(missing_ok=True)
    for rank, (host, sees_it) in enumerate(places):
        if not sees_it:
            raise UserError(
                f"output {folder} is not shared: process {rank} on {host} does not see what "
                f"process 0 on {places[0][0]} writes there; name a folder that all machines see "
                "with --output."
            )
