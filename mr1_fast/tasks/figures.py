"""Area and perimeter of a figure made of unit squares: geometry that a small model can see.

Difficulty d draws connected figures on a grid of (d+3)×(d+3) squares: up to 9 of 16 at difficulty 1, 14 of 25 at 2. The
area is a count of squares, as in visual counting; the perimeter is not, so one skill carries over and the other does
not. Which squares are filled decides the split, whatever is asked: thousands of figures, unlike the few hundred pairs
of angles that `geometry` has at difficulty 1.
"""

import random

from PIL import Image, ImageDraw

from ..types import Example
from .counting import CELL, is_correct
from .split import draw_for_split

__all__ = ["draw", "is_correct"]


def draw(split: str, seed: int, index: int, difficulty: int = 1) -> Example:
    """Draw item `index` of a split ("train", "validation" or "test"); the same arguments give the same item.

    The image is (28·(d+3))² pixels. A figure (its filled squares) belongs to exactly one split.
    """
    side = difficulty + 3

    def filled(rng: random.Random) -> tuple[int, ...]:
        squares = {rng.randrange(side * side)}
        for _ in range(rng.randrange(side * side * 9 // 16)):
            edge = {beside for square in squares for beside in _neighbours(square, side)} - squares
            squares.add(rng.choice(sorted(edge)))
        return tuple(sorted(squares))

    squares, rng = draw_for_split(filled, split, ("figures", seed, index, difficulty))
    perimeter = sum(4 - sum(beside in squares for beside in _neighbours(square, side)) for square in squares)
    asked, size, unit = rng.choice((("area", len(squares), "squares"), ("perimeter", perimeter, "sides")))
    return Example(
        problem=f"The figure is made of unit squares. What is its {asked}?",
        images=(_paint(squares, side, rng),),
        solution=str(size),
        thinking=f"{size} {unit}",
        key=f"{asked} {' '.join(map(str, squares))}",
    )


def _neighbours(square: int, side: int) -> list[int]:
    """The squares that share a side with `square`, numbered by rows."""
    row, column = divmod(square, side)
    steps = ((row - 1, column), (row + 1, column), (row, column - 1), (row, column + 1))
    return [y * side + x for y, x in steps if 0 <= y < side and 0 <= x < side]


def _paint(squares: tuple[int, ...], side: int, rng: random.Random) -> Image.Image:
    """Paint the figure with jittered place, scale and colours, every square outlined."""
    scale = 4  # drawn larger and shrunk, for smooth edges
    image = Image.new("RGB", (side * CELL * scale,) * 2, tuple(rng.randint(225, 255) for _ in range(3)))
    pen = ImageDraw.Draw(image)
    width = rng.uniform(0.79, 0.93) * CELL
    margin = side * (CELL - width) / 2
    left, top = (margin + rng.uniform(-4, 4) for _ in range(2))
    ink, fill = tuple(rng.randint(0, 130) for _ in range(3)), tuple(rng.randint(60, 200) for _ in range(3))
    for square in squares:
        x, y = left + square % side * width, top + square // side * width
        box = [x * scale, y * scale, (x + width) * scale, (y + width) * scale]
        pen.rectangle(box, fill=fill, outline=ink, width=scale)
    return image.resize((side * CELL,) * 2, Image.Resampling.BOX)
