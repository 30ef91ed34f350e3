"""The processes of a run: who this one is, and how small values go between all of them.

What is exchanged here are numbers and Python objects of a few hundred KiB a step, over gloo, so
that nothing waits for a GPU. Gradients and weights go through sharding.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist

Item = TypeVar("Item")


@dataclass(frozen=True)
class World:
    """The processes of a run, of which this is number `rank` of `size`.

    Every method but `share` and `places` is collective: all processes call it, in the same order.
    A world of one process needs no torch.distributed.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    """The number of this process on its machine, which is that of its GPU."""
    local_size: int = 1
    """Processes on this machine."""
    control: dist.ProcessGroup | None = None
    """The group, over gloo, through which small values go; None for one process."""

    @property
    def is_first(self) -> bool:
        """Whether this process writes, prints and draws the bar."""
        return self.rank == 0

    # --- who has what ---------------------------------------------------------------------------

    def share(self, items: Sequence[Item]) -> list[Item]:
        """Return this process's part of the items: every `size`-th, from number `rank` on."""
        return list(items[self.rank :: self.size])

    def places(self, count: int) -> range:
        """Return the numbers, in the full list, of the first `count` items of this share."""
        return range(self.rank, self.rank + count * self.size, self.size)

    def whole(self, mine: Sequence[Item]) -> list[Item]:
        """Put the parts of all processes together again: undoes `share`, on every process."""
        return in_order(self.gather(list(mine)))

    # --- exchange -------------------------------------------------------------------------------

    def gather(self, value: Item) -> list[Item]:
        """Return the value of every process, in the order of their ranks."""
        if self.size == 1:
            return [value]
        values: list[Item] = [value] * self.size
        dist.all_gather_object(values, value, group=self.control)
        return values

    def of_first(self, value: Item) -> Item:
        """Return the value of the first process."""
        if self.size == 1:
            return value
        values = [value]
        dist.broadcast_object_list(values, src=0, group=self.control)
        return values[0]

    def sums(self, values: Sequence[float]) -> list[float]:
        """Return the sums of numbers over all processes, in fp64."""
        return self._reduced(values, dist.ReduceOp.SUM)

    def most(self, value: float) -> float:
        """Return the largest of the processes' numbers."""
        return self._reduced([value], dist.ReduceOp.MAX)[0]

    def least(self, value: float) -> float:
        """Return the smallest of the processes' numbers."""
        return self._reduced([value], dist.ReduceOp.MIN)[0]

    def in_all(self, work: Callable[[], Item]) -> Item:
        """Return `work()`, which is not collective; an error of one process is raised in all."""
        result = error = None
        try:
            result = work()
        except Exception as failure:
            error = failure
        for each in (error, *self.gather(error)):
            if each is not None:
                raise each
        return result

    def barrier(self) -> None:
        """Wait until every process has come here."""
        if self.size > 1:
            dist.barrier(group=self.control)

    @contextmanager
    def in_turn(self) -> Iterator[None]:
        """Run a block on the first process, then on the first of each machine, then on the others.

        What the first one downloads or makes, the others find in a cache.
        """
        turn = 0 if self.is_first else 1 if self.local_rank == 0 else 2
        for _ in range(turn):
            self.barrier()
        yield
        for _ in range(turn, 3):
            self.barrier()

    @contextmanager
    def one_by_one(self) -> Iterator[None]:
        """Run a block on one process of each machine at a time: its memory holds one model."""
        turns = int(self.most(self.local_size))
        for _ in range(self.local_rank):
            self.barrier()
        yield
        for _ in range(self.local_rank, turns):
            self.barrier()

    def _reduced(self, values: Sequence[float], operation: dist.ReduceOp) -> list[float]:
        if self.size == 1:
            return list(map(float, values))
        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor, operation, group=self.control)
        return tensor.tolist()


def in_order(parts: Sequence[Sequence[Item]]) -> list[Item]:
    """Put the parts that `World.share` has made together again, in the order of the whole."""
    longest = max(map(len, parts), default=0)
    return [part[index] for index in range(longest) for part in parts if index < len(part)]


SINGLE = World()
"""A run of one process."""
