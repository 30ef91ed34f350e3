"""Area and perimeter of a figure made of unit squares: geometry that a small model can see.

Difficulty d draws connected figures on a grid of (d+3)×(d+3) squares: 3–11 of 16 squares at
difficulty 1, and 3–17 of 25 at difficulty 2. The area is a count of squares, as in visual counting;
the perimeter is not, so one skill carries over and the other does not.

The filled squares decide the split, whatever is asked. There are thousands of figures, unlike the
few hundred pairs of angles that `geometry` has at difficulty 1. Held-out items do not repeat: the
same question about the same figure twice would be one item.
"""

import random
from functools import lru_cache

from PIL import Image, ImageDraw

from ..errors import UserError
from ..types import Example
from .counting import CELL
from .split import draw_for_split

MOST_REPEATS = 1000
"""Drawn figures in a row, all of them seen before, after which no new one is looked for."""


def draw(split: str, seed: int, index: int, difficulty: int = 1, painted: bool = True) -> Example:
    """Draw item `index` of a split ("train", "validation" or "test"); the same arguments give the
    same item.

    The image is (28·(d+3))² pixels. A figure (its filled squares) belongs to exactly one split.
    Raises UserError for more held-out items than there are.
    """
    if split != "train":
        index = _new_entry(split, seed, index, difficulty)
    side = difficulty + 3
    asked, squares, rng = _parameters(split, seed, index, difficulty)
    shared_sides = sum(
        beside in squares for square in squares for beside in _neighbours(square, side)
    )
    perimeter = 4 * len(squares) - shared_sides
    size, unit = (len(squares), "squares") if asked == "area" else (perimeter, "sides")
    return Example(
        problem=f"The figure is made of unit squares. What is its {asked}?",
        images=(_paint(squares, side, rng),) if painted else (),
        solution=str(size),
        thinking=f"{size} {unit}",
        key=f"{asked} {' '.join(map(str, squares))}",
    )


def _parameters(
    split: str, seed: int, entry: int, difficulty: int
) -> tuple[str, tuple[int, ...], random.Random]:
    """Draw entry `entry` of the stream: what is asked, and which squares are filled.

    Returns them with the generator, from which the figure's looks are drawn next.
    """
    side = difficulty + 3

    def filled(rng: random.Random) -> tuple[int, ...]:
        squares = {rng.randrange(side * side)}
        edge = set(_neighbours(*squares, side))
        for _ in range(rng.randint(2, side * side * 11 // 16 - 1)):
            square = rng.choice(sorted(edge))
            squares.add(square)
            edge = (edge | _neighbours(square, side)) - squares
        return tuple(sorted(squares))

    squares, rng = draw_for_split(filled, split, ("figures", seed, entry, difficulty))
    return rng.choice(("area", "perimeter")), squares, rng


def _new_entry(split: str, seed: int, index: int, difficulty: int) -> int:
    """Return the entry of the stream with the `index`-th new question about a figure."""
    entries, seen = _first_entries(split, seed, difficulty)
    entry = entries[-1] + 1 if entries else 0
    while len(entries) <= index:
        parameters = _parameters(split, seed, entry, difficulty)[:2]
        if parameters not in seen:
            seen.add(parameters)
            entries.append(entry)
        elif entry - entries[-1] > MOST_REPEATS:
            raise UserError(
                f"figures of difficulty {difficulty} have no {index + 1} different {split} items: "
                "ask for fewer, or raise the difficulty."
            )
        entry += 1
    return entries[index]


@lru_cache(maxsize=16)
def _first_entries(split: str, seed: int, difficulty: int) -> tuple[list[int], set]:
    """Return the entries with a new question that are known so far, and those questions.

    Both start empty; `_new_entry` extends them.
    """
    return [], set()


@lru_cache(maxsize=256)
def _neighbours(square: int, side: int) -> frozenset[int]:
    """Return the squares that share a side with `square`; squares are numbered row by row."""
    row, column = divmod(square, side)
    steps = ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1))
    return frozenset(y * side + x for y, x in steps if 0 <= y < side and 0 <= x < side)


def _paint(squares: tuple[int, ...], side: int, rng: random.Random) -> Image.Image:
    """Paint the figure at a random place and scale, in random colours, every square outlined."""
    scale = 4  # painted larger and then shrunk, for smooth edges
    paper = tuple(rng.randint(225, 255) for _ in range(3))
    image = Image.new("RGB", (side * CELL * scale,) * 2, paper)
    pen = ImageDraw.Draw(image)
    width = rng.uniform(0.79, 0.93) * CELL
    margin = side * (CELL - width) / 2
    left, top = (margin + rng.uniform(-4, 4) for _ in range(2))
    ink = tuple(rng.randint(0, 130) for _ in range(3))
    fill = tuple(rng.randint(60, 200) for _ in range(3))
    for square in squares:
        x, y = left + square % side * width, top + square // side * width
        box = [x * scale, y * scale, (x + width) * scale, (y + width) * scale]
        pen.rectangle(box, fill=fill, outline=ink, width=scale)
    return image.resize((side * CELL,) * 2, Image.Resampling.BOX)
