"""The order in which a limited number of examples is taken, epoch after epoch."""

import random
from functools import lru_cache

from ...errors import UserError


def check_limit(limit: int | None) -> None:
    """Raise UserError unless `limit` is None or a positive number of examples."""
    if limit is not None and limit < 1:
        raise UserError(
            f"limit is {limit}: set it to 1 or more examples, or leave it out to use all."
        )


def shuffled(size: int, seed: int | str, start: int, count: int) -> list[int]:
    """Return entries `start` … `start + count − 1` of an endless list of indices.

    In every epoch the list holds each of 0 … size − 1 once, in an order of the epoch's own. Other
    seeds give other lists.
    """
    entries = range(start, start + count)
    return [_epoch_order(size, seed, entry // size)[entry % size] for entry in entries]


@lru_cache(maxsize=4)
def _epoch_order(size: int, seed: int | str, epoch: int) -> list[int]:
    """Return 0 … size − 1 in an epoch's random order."""
    order = list(range(size))
    random.Random(f"epoch order {seed} {epoch}").shuffle(order)
    return order
