"""Diagrams of points, segments and marked angles: what a geometry family draws, and how it is
painted.

Points are complex numbers with y downwards, as in an image, in a plane of no particular scale.
`paint` places every figure in the same way: turned, mirrored, scaled and shifted at random.
"""

import cmath
import math
import random
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont


@dataclass
class Angle:
    """An angle of a figure.

    One whose name is a digit always carries a mark; others only where sizes are written.
    """

    name: str
    degrees: int
    corners: tuple[str, str, str]
    """Names of a point on the first side, the vertex, and a point on the second side."""
    place: float = 0.5
    """Where the mark's text stands between the first side (0) and the second (1)."""


@dataclass
class Figure:
    """What a family draws and asks."""

    premise: str
    """What the problem says before the numbers."""
    points: dict[str, complex]
    """The points by name."""
    segments: list[tuple[str, str]]
    """The names of both ends of each line that is drawn."""
    letters: str
    """The points whose names are written."""
    given: list[Angle]
    """The angles whose sizes are told."""
    asked: Angle
    """The angle whose size is the answer."""
    thinking: str
    """The calculation that a worked solution shows."""
    circle: bool = False
    """Whether a circle of radius 1 is drawn around the point O."""


def direction(degrees: float) -> complex:
    """Return the point at distance 1 from the origin in this direction."""
    return cmath.rect(1, math.radians(degrees))


def paint(figure: Figure, side: int, write_sizes: bool, rng: random.Random) -> Image.Image:
    """Paint the figure on side × side pixels, placed at random and in random colours.

    With `write_sizes` the marks show the sizes of the given angles, and `?` or a digit for the
    asked one.
    """
    scale = 4  # painted larger and then shrunk, for smooth edges
    points, radius = place(figure, side * scale, rng)
    ink, mark_ink, text_ink = (tuple(rng.randint(0, 130) for _ in range(3)) for _ in range(3))
    paper = tuple(rng.randint(225, 255) for _ in range(3))
    image = Image.new("RGB", (side * scale,) * 2, paper)
    pen = ImageDraw.Draw(image)
    width = round(rng.uniform(1.0, 1.0 + side / 168) * scale)
    font = ImageFont.load_default((10 + side // 56) * scale)

    if figure.circle:
        pen.circle(_xy(points["O"]), radius, outline=ink, width=width)
    for start, end in figure.segments:
        pen.line([_xy(points[start]), _xy(points[end])], fill=ink, width=width)
    for angle in (*figure.given, figure.asked):
        if not (write_sizes or angle.name.isdigit()):
            continue
        name = angle.name if angle.name.isdigit() else "?"
        label = f"{angle.degrees}°" if write_sizes and angle is not figure.asked else name
        sides = [points[name] for name in angle.corners]
        # The mark of a whole angle is drawn outside the marks of its halves.
        arc = side * scale * (0.09 if angle.place == 0.5 else 0.13)
        line = max(scale, width // 2)
        spot = _mark(pen, sides, arc, angle.place, font.getlength(label), mark_ink, line)
        _write(pen, spot, label, font, text_ink, paper)
    for letter in figure.letters:
        spot = _beside(letter, figure, points, 0.75 * font.size)
        _write(pen, spot, letter, font, text_ink, paper)
    return image.resize((side, side), Image.Resampling.BOX)


def place(figure: Figure, side: int, rng: random.Random) -> tuple[dict[str, complex], float]:
    """Turn, mirror, scale and shift the points at random onto an image of side × side pixels.

    Returns the points in pixels, and the radius of the circle.
    """
    turn, mirror = direction(rng.uniform(0, 360)), rng.random() < 0.5
    points = {
        name: turn * (point.conjugate() if mirror else point)
        for name, point in figure.points.items()
    }
    extent = list(points.values())
    if figure.circle:
        extent += [points["O"] + step for step in (1, -1, 1j, -1j)]
    low = complex(min(z.real for z in extent), min(z.imag for z in extent))
    size = complex(max(z.real for z in extent), max(z.imag for z in extent)) - low
    margin = 0.11 * side  # space for the letters
    scale = rng.uniform(0.85, 1.0) * (side - 2 * margin) / max(size.real, size.imag)
    free = [side - 2 * margin - scale * part for part in (size.real, size.imag)]
    shift = complex(*(margin + rng.random() * part for part in free))
    return {name: shift + scale * (point - low) for name, point in points.items()}, scale


def _mark(
    pen: ImageDraw.ImageDraw,
    sides: list[complex],
    arc: float,
    place: float,
    text_width: float,
    ink: tuple,
    width: int,
) -> complex:
    """Draw the arc of the angle with corners `sides`, of which the second is its vertex.

    Returns where a text of width `text_width` fits.
    """
    start, vertex, end = sides
    sweep = math.degrees(cmath.phase((end - vertex) / (start - vertex)))  # −180 … 180
    first = math.degrees(cmath.phase(start - vertex))
    reach = min(abs(start - vertex), abs(end - vertex))
    arc = min(arc, 0.5 * reach)
    box = [_xy(vertex - complex(arc, arc)), _xy(vertex + complex(arc, arc))]
    pen.arc(box, min(first, first + sweep), max(first, first + sweep), fill=ink, width=width)
    # In a narrow angle the text moves outwards until it fits between the sides.
    narrow = math.sin(math.radians(abs(sweep)) * min(place, 1 - place))
    distance = max(arc + 0.6 * text_width, min(0.6 * text_width / narrow, 0.7 * reach))
    return vertex + distance * direction(first + place * sweep)


def _beside(letter: str, figure: Figure, points: dict[str, complex], distance: float) -> complex:
    """Return where a point's letter stands: on the far side of the segments that meet there."""
    here = points[letter]
    others = [
        points[end if start == letter else start]
        for start, end in figure.segments
        if letter in (start, end)
    ]
    away = -sum((other - here) / abs(other - here) for other in others)
    return here + distance * away / abs(away)


def _write(
    pen: ImageDraw.ImageDraw,
    spot: complex,
    label: str,
    font: ImageFont.FreeTypeFont,
    ink: tuple,
    paper: tuple,
) -> None:
    """Write a label centred on `spot`, on a thin rim of the paper's colour.

    It is moved inwards where it would leave the image.
    """
    left, top, right, bottom = font.getbbox(label, anchor="mm")
    width, height = pen.im.size
    x = min(max(spot.real, -left), width - right)
    y = min(max(spot.imag, -top), height - bottom)
    pen.text(
        (x, y),
        label,
        font=font,
        fill=ink,
        anchor="mm",
        stroke_width=round(font.size / 10),
        stroke_fill=paper,
    )


def _xy(point: complex) -> tuple[float, float]:
    """Return a point's coordinates, as Pillow takes them."""
    return point.real, point.imag
