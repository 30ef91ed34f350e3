"""Visual counting: how many coloured shapes stand in a jittered grid of cells?

Difficulty d draws on a (d+2)×(d+2) grid: 1–9 items on 3×3 cells at difficulty 1, up to 16 at 2, 25 at 3.
The worked solution names the count in its reasoning too, `5 items`. A sum over rows was tried: the tiny model learns
the count first and the rows much later, so its reasoning was noise that the answer then contradicted.
"""

import math
import random
import re

from PIL import Image, ImageDraw

from ..types import Example
from .split import draw_for_split

COLOURS = {
    "red": (214, 39, 40),
    "green": (44, 160, 44),
    "blue": (31, 119, 180),
    "yellow": (240, 200, 20),
    "purple": (148, 80, 189),
    "cyan": (23, 190, 207),
}
SHAPES = ("circle", "square", "triangle")
CELL = 28
"""Pixels per cell: one merged Qwen2-VL image token (14-pixel patches, merged 2×2)."""


def draw(split: str, seed: int, index: int, difficulty: int = 1) -> Example:
    """Draw item `index` of a split ("train", "validation" or "test"); the same arguments give the same item.

    The image is (28·(d+2))² pixels. A layout (cells, shapes and colours) belongs to exactly one split.
    """
    side = difficulty + 2

    def layout(rng: random.Random) -> tuple:
        count = rng.randint(1, side * side)
        cells = sorted(rng.sample(range(side * side), count))
        return tuple((cell, rng.choice(SHAPES), rng.choice(tuple(COLOURS))) for cell in cells)

    items, rng = draw_for_split(layout, split, ("counting", seed, index, difficulty))
    return Example(
        problem="How many items are there in the image?",
        images=(_paint(items, side, rng),),
        solution=str(len(items)),
        thinking=f"{len(items)} items",
        key=" ".join(f"{cell}:{colour} {shape}" for cell, shape, colour in items),
    )


def is_correct(output: str, solution: str) -> bool:
    """The published verdict of R1-V's counting evaluation: the integer in the first answer tag equals the solution."""
    return solution.strip().isdecimal() and tagged_integer(output) == int(solution)


def tagged_integer(output: str) -> int | None:
    """The integer in the first answer tag that holds one; of at most nine digits, for Python refuses endless ones."""
    found = re.search(r"<answer>\s*(\d{1,9})\s*</answer>", output)
    return int(found[1]) if found else None


def _paint(items: tuple, side: int, rng: random.Random) -> Image.Image:
    """Paint each item in its cell with jittered place, size, shade, and rotation (triangles)."""
    scale = 4  # drawn larger and shrunk, for smooth edges
    background = tuple(rng.randint(225, 255) for _ in range(3))
    image = Image.new("RGB", (side * CELL * scale,) * 2, background)
    pen = ImageDraw.Draw(image)
    for cell, shape, colour in items:
        radius = rng.uniform(6.5, 10.0)
        room = CELL / 2 - radius - 0.5
        x = (cell % side + 0.5) * CELL + rng.uniform(-room, room)
        y = (cell // side + 0.5) * CELL + rng.uniform(-room, room)
        fill = tuple(
            max(0, min(255, channel + rng.randint(-25, 25))) for channel in COLOURS[colour]
        )
        box = [
            (x - radius) * scale,
            (y - radius) * scale,
            (x + radius) * scale,
            (y + radius) * scale,
        ]
        if shape == "circle":
            pen.ellipse(box, fill=fill)
        elif shape == "square":
            pen.rectangle(
                [box[0] + scale, box[1] + scale, box[2] - scale, box[3] - scale], fill=fill
            )
        else:
            turn = rng.uniform(0, 2 * math.pi)
            corners = [
                (
                    (x + radius * math.cos(turn + k * 2 * math.pi / 3)) * scale,
                    (y + radius * math.sin(turn + k * 2 * math.pi / 3)) * scale,
                )
                for k in range(3)
            ]
            pen.polygon(corners, fill=fill)
    return image.resize((side * CELL,) * 2, Image.Resampling.BOX)
