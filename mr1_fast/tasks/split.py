"""Train, validation and test items that share no parameters, by construction."""

import random
from collections.abc import Callable
from typing import TypeVar
from zlib import crc32

SPLITS = ("train", "validation", "test")
Parameters = TypeVar("Parameters")


def split_of(parameters: object) -> str:
    """The one split that an item with these parameters belongs to (of ten: 7 train, 1 validation, 2 test)."""
    bucket = crc32(repr(parameters).encode()) % 10
    return "test" if bucket < 2 else "validation" if bucket == 2 else "train"


def draw_for_split(
    draw: Callable[[random.Random], Parameters], split: str, stream: tuple
) -> tuple[Parameters, random.Random]:
    """Redraw until the parameters fall in `split`; return them with the generator, for jitter.

    `stream` names the random stream, so equal streams give equal items. The parameter space must reach every split.
    """
    rng = random.Random(repr((*stream, split)))
    while True:
        parameters = draw(rng)
        if split_of(parameters) == split:
            return parameters, rng
