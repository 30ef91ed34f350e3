"""Who has what, and what small values become of all processes."""

import math

import pytest
import torch

from mr1_fast.distributed import SINGLE, World
from mr1_fast.distributed.world import in_order
from mr1_fast.divergence import not_finite
from tests.data.gang import gang


@pytest.mark.parametrize("size", [1, 2, 3, 5])
def test_shares_put_together_are_the_whole(size):
    items = list("abcdefg")
    worlds = [World(rank=rank, size=size) for rank in range(size)]
    parts = [world.share(items) for world in worlds]
    assert in_order(parts) == items
    for world, part in zip(worlds, parts, strict=True):
        assert [items[place] for place in world.places(len(part))] == part


def test_one_process_has_everything_and_exchanges_with_nobody():
    assert SINGLE.whole([1, 2]) == [1, 2] and SINGLE.gather("a") == ["a"]
    assert SINGLE.sums([1.0, 2.0]) == [1.0, 2.0] and SINGLE.most(3) == SINGLE.least(3) == 3
    with SINGLE.in_turn():
        SINGLE.barrier()


def exchange(world):
    with world.in_turn():
        pass
    sums = world.sums([world.rank, 1])
    whole = world.whole(world.share(list("abcd")))
    mine = torch.tensor([1.0, math.nan if world.is_first else 1.0])
    lost = not_finite([("a", torch.ones(3)), ("b", mine)], world)
    assert (not_finite([("a", torch.ones(3))], world), lost) == ("", "b")
    return sums, whole, world.most(world.rank), world.least(world.rank), world.of_first(world.rank)


@pytest.mark.parametrize("size", [2, 3])
def test_processes_exchange_small_values(size):
    expected = [sum(range(size)), size], list("abcd"), size - 1, 0, 0
    assert gang(size, exchange) == [expected] * size


def fail(world):
    if world.rank == 1:
        raise ValueError("this one fails")
    world.barrier()


def test_the_process_that_fails_is_named():
    with pytest.raises(AssertionError, match=r"process 1:(.|\n)*this one fails"):
        gang(2, fail)
