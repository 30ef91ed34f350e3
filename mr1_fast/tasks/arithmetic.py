"""Arithmetic in words alone: sums, differences and products of whole numbers, without an image.

Difficulty d asks for sums and differences of numbers of d+1 digits, within d+1 digits: within 100
at difficulty 1, within 1,000 at 2. From difficulty 2 on it also asks for a number of d digits times
one digit. The reasoning of the worked solution goes through the columns from the right as it is
taught at school, `7+8=15 4+3+1=8` for 47 + 38, so that each step is one that a small model can
learn, and the answer is written down from it.

The two numbers decide the split, in whatever order they are asked.
"""

import random

from ..types import Example
from .split import draw_for_split


def draw(split: str, seed: int, index: int, difficulty: int = 1) -> Example:
    """Draw item `index` of a split ("train", "validation" or "test"); the same arguments give the
    same item.

    A calculation (its kind and its two numbers) belongs to exactly one split.
    """
    least, most = 10**difficulty, 10 ** (difficulty + 1) - 1
    kinds = "+-" if difficulty == 1 else "+-×"

    def numbers(rng: random.Random) -> tuple[str, int, int]:
        kind = rng.choice(kinds)
        if kind == "×":
            return kind, rng.randint(least // 10, least - 1), rng.randint(2, 9)
        total = rng.randint(2 * least, most)
        part = rng.randint(least, total - least)
        return (kind, total, part) if kind == "-" else (kind, *sorted((part, total - part)))

    (kind, first, second), rng = draw_for_split(
        numbers, split, ("arithmetic", seed, index, difficulty)
    )
    if kind == "+" and rng.random() < 0.5:
        first, second = second, first
    result, thinking = _WORKED[kind](first, second)
    asked = f"{first} {kind} {second}"
    return Example(
        problem=f"What is {asked}?", images=(), solution=str(result), thinking=thinking, key=asked
    )


def _sum(first: int, second: int) -> tuple[int, str]:
    """Return first + second, and its columns: the digits, and what was carried."""
    steps, carried = [], 0
    for a, b in _columns(first, second):
        value = a + b + carried
        steps.append(f"{a}+{b}{f'+{carried}' if carried else ''}={value}")
        carried = value // 10
    return first + second, " ".join(steps)


def _difference(first: int, second: int) -> tuple[int, str]:
    """Return first − second, and its columns: ten more where needed, and what was borrowed."""
    steps, borrowed = [], 0
    for a, b in _columns(first, second):
        lent = 10 if a - borrowed < b else 0
        value = a + lent - borrowed - b
        steps.append(f"{a + lent}{f'-{borrowed}' if borrowed else ''}-{b}={value}")
        borrowed = lent // 10
    return first - second, " ".join(steps)


def _product(first: int, digit: int) -> tuple[int, str]:
    """Return first × digit, and its columns: a digit of `first` times it, and what was carried."""
    steps, carried = [], 0
    for a, _ in _columns(first, 0):
        value = a * digit + carried
        steps.append(f"{a}×{digit}{f'+{carried}' if carried else ''}={value}")
        carried = value // 10
    return first * digit, " ".join(steps)


def _columns(first: int, second: int) -> list[tuple[int, int]]:
    """Return the digits of two numbers in pairs from the right, as many as the longer one has.

    >>> _columns(147, 38)
    [(7, 8), (4, 3), (1, 0)]
    """
    width = max(len(str(first)), len(str(second)))
    pairs = zip(f"{first:0{width}}", f"{second:0{width}}", strict=True)
    return [(int(a), int(b)) for a, b in pairs][::-1]


_WORKED = {"+": _sum, "-": _difference, "×": _product}
"""The result and its worked line, by the kind of calculation."""
