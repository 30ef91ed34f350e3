"""Train, validation and test items that share no parameters, by construction."""

import random
from collections.abc import Callable
from typing import TypeVar
from zlib import crc32

from ..errors import UserError

SPLITS = ("train", "validation", "test")
Parameters = TypeVar("Parameters")


def check_split(split: str) -> None:
    """Raise UserError unless there is a split of that name."""
    if split not in SPLITS:
        raise UserError(
            f"split is {split!r}, but the splits are {', '.join(SPLITS)}: choose one of them."
        )


def split_of(parameters: object) -> str:
    """Return the one split to which an item with these parameters belongs.

    Of ten items, 7 belong to train, 1 to validation and 2 to test.
    """
    bucket = crc32(repr(parameters).encode()) % 10
    return "test" if bucket < 2 else "validation" if bucket == 2 else "train"


def draw_for_split(
    draw: Callable[[random.Random], Parameters], split: str, stream: tuple
) -> tuple[Parameters, random.Random]:
    """Draw parameters again and again until they belong to `split`.

    Returns them with the random generator, from which the item's looks are drawn next. `stream`
    names the random stream: equal streams give equal items. Some parameters that `draw` returns
    must belong to every split.
    """
    rng = random.Random(repr((*stream, split)))
    while True:
        parameters = draw(rng)
        if split_of(parameters) == split:
            return parameters, rng
