"""Visual counting: the number of coloured shapes in a grid of cells.

Difficulty d draws on a (d+2)×(d+2) grid: 1–9 items on 3×3 cells at difficulty 1, up to 16 at 2, and
up to 25 at 3. The reasoning of the worked solution names the count, `5 items`. A sum over the rows
was tried: the tiny model learns the count first and the rows much later, so its reasoning was noise
that its answer then contradicted.
"""

import math
import random

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
"""Width of a cell in pixels: one Qwen2-VL image token, which is 2×2 patches of 14 pixels.

It is the same for every family, so that all of them are asked the same items. The image tokens of
Qwen3-VL are 32 pixels wide. The built-in `tiny-qwen3vl` enlarges 3×3 cells to 3×3 of them, and 4×4
to 4×4; of 5×5 cells it makes 4×4. The published models make at least 64 tokens of any image, which
they enlarge to 65,536 pixels.
"""


def draw(split: str, seed: int, index: int, difficulty: int = 1, painted: bool = True) -> Example:
    """Draw item `index` of a split ("train", "validation" or "test"); the same arguments give the
    same item.

    The image is (28·(d+2))² pixels. A layout (cells, shapes and colours) belongs to exactly one
    split.
    """
    side = difficulty + 2

    def layout(rng: random.Random) -> tuple:
        count = rng.randint(1, side * side)
        cells = sorted(rng.sample(range(side * side), count))
        return tuple((cell, rng.choice(SHAPES), rng.choice(tuple(COLOURS))) for cell in cells)

    items, rng = draw_for_split(layout, split, ("counting", seed, index, difficulty))
    return Example(
        problem="How many items are there in the image?",
        images=(_paint(items, side, rng),) if painted else (),
        solution=str(len(items)),
        thinking=f"{len(items)} items",
        key=" ".join(f"{cell}:{colour} {shape}" for cell, shape, colour in items),
    )


def _paint(items: tuple, side: int, rng: random.Random) -> Image.Image:
    """Paint each item in its cell, with a random place, size and shade, and a triangle's turn."""
    scale = 4  # painted larger and then shrunk, for smooth edges
    background = tuple(rng.randint(225, 255) for _ in range(3))
    image = Image.new("RGB", (side * CELL * scale,) * 2, background)
    pen = ImageDraw.Draw(image)
    for cell, shape, colour in items:
        radius = rng.uniform(6.5, 10.0)
        shift = CELL / 2 - radius - 0.5
        x = (cell % side + 0.5) * CELL + rng.uniform(-shift, shift)
        y = (cell // side + 0.5) * CELL + rng.uniform(-shift, shift)
        fill = tuple(
            max(0, min(255, channel + rng.randint(-25, 25))) for channel in COLOURS[colour]
        )
        left, top = (x - radius) * scale, (y - radius) * scale
        right, bottom = (x + radius) * scale, (y + radius) * scale
        if shape == "circle":
            pen.ellipse([left, top, right, bottom], fill=fill)
        elif shape == "square":
            pen.rectangle([left + scale, top + scale, right - scale, bottom - scale], fill=fill)
        else:
            turn = rng.uniform(0, 2 * math.pi)
            corners = []
            for k in range(3):
                angle = turn + k * 2 * math.pi / 3
                corner_x, corner_y = x + radius * math.cos(angle), y + radius * math.sin(angle)
                corners.append((corner_x * scale, corner_y * scale))
            pen.polygon(corners, fill=fill)
    return image.resize((side * CELL,) * 2, Image.Resampling.BOX)
