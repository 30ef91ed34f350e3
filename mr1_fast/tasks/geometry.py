"""Angles in drawn diagrams: a short problem in GeoQA's style, a figure true to its numbers, an answer such as `145°`.

| difficulty | families | numbers | pixels |
|---|---|---|---|
| 1 | third angle of a triangle | multiples of 5, in the problem | 84×84 |
| 2 | + parallel lines, bisector; only the figure tells angle 1 from 2 | multiples of 5, in the problem | 84×84 |
| 3 | + exterior angle, isosceles triangle, circle angles, tangent | integers, in the problem | 168×168 |
| 4 | as 3 | integers, in the figure only | 224×224 |

A family samples its parameters (angles in degrees, then the variant) and turns them into a Figure: points in a plane
of no particular scale. `_paint` places every figure the same way, with random turn, mirror image, size, place and
colours. Points are complex numbers, y downwards as in an image.
"""

import cmath
import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont

from ..errors import UserError
from ..types import Example
from .split import draw_for_split

SIDES = {1: 84, 2: 84, 3: 168, 4: 224}
"""Pixels of the square image at each difficulty: multiples of 28, one merged Qwen2-VL image token."""
SMALLEST = {5: 10, 1: 30}
"""Step between sizes, in degrees: the smallest angle of a triangle that has two angles given or asked. Integers may
be written into the figure, which takes room."""


@dataclass
class Angle:
    """An angle of a figure. One called by a digit always carries a mark; its size is written at difficulty 4."""

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
    segments: list[tuple[str, str]]
    letters: str
    """The points whose names are written."""
    given: list[Angle]
    asked: Angle
    thinking: str
    circle: bool = False
    """Whether a circle of radius 1 is drawn around the point O."""


def draw(split: str, seed: int, index: int, difficulty: int = 1) -> Example:
    """Draw item `index` of a split ("train", "validation" or "test"); the same arguments give the same item.

    Parameters (family, angles, variant) belong to exactly one split, at every difficulty. Raises UserError for a
    difficulty outside 1–4.
    """
    if difficulty not in SIDES:
        raise UserError(
            f"difficulty is {difficulty}, but geometry has difficulties 1 to {max(SIDES)}: choose one."
        )
    families = [name for name, (first, _, _) in FAMILIES.items() if first <= difficulty]

    def parameters(rng: random.Random) -> tuple:
        family = rng.choice(families)
        return (family, *FAMILIES[family][1](rng, 5 if difficulty <= 2 else 1))

    chosen, rng = draw_for_split(parameters, split, ("geometry", seed, index, difficulty))
    figure = FAMILIES[chosen[0]][2](chosen[1:], rng)
    given = [f"angle {angle.name} = {angle.degrees}" for angle in figure.given if difficulty < 4]
    return Example(
        problem=", ".join([figure.premise, *given, f"angle {figure.asked.name} = ()"]),
        images=(_paint(figure, SIDES[difficulty], difficulty == 4, rng),),
        solution=f"{figure.asked.degrees}°",
        thinking=figure.thinking,
        key=" ".join(map(str, chosen)),
    )


def is_correct(output: str, solution: str) -> bool:
    """The published verdict of R1-V's geometry evaluation: the output is mathematically equal to the solution."""
    from ..rewards.math_check import math_equal

    return math_equal(output, solution)


# Samplers: (generator, step between sizes in degrees) -> parameters


def _two_angles(rng: random.Random, step: int) -> tuple[int, int]:
    """Two angles of a triangle, smaller first, so that 50 and 60 share a split with 60 and 50."""
    smallest = SMALLEST[step]
    while True:
        first, second = (rng.randrange(smallest, 181 - 2 * smallest, step) for _ in range(2))
        if first + second <= 180 - smallest:
            return min(first, second), max(first, second)


def _ordered_angles(rng: random.Random, step: int) -> tuple[int, int, str]:
    """Two angles of a triangle, and whether the exterior angle is asked or given."""
    return (*rng.sample(_two_angles(rng, step), 2), rng.choice(("outside", "remote")))


def _one_angle(
    low: int, high: int, *variants: str
) -> Callable[[random.Random, int], tuple[int, str]]:
    """A sampler of one angle from low to high degrees and one of the variants."""
    return lambda rng, step: (rng.randrange(low, high + 1, step), rng.choice(variants))


# Painters: (parameters, generator) -> figure


def _third_angle(parameters: tuple, rng: random.Random) -> Figure:
    sizes = rng.sample(parameters, 2)
    names = rng.sample("ABC", 3)
    points = dict(zip(names, _triangle(*sizes), strict=True))
    first, second, third = (
        Angle(name, size, (names[k - 2], name, names[k - 1]))
        for k, (name, size) in enumerate(zip(names, [*sizes, 180 - sum(sizes)], strict=True))
    )
    thinking = f"{sizes[0]}+{sizes[1]}={sum(sizes)}"
    return Figure("In triangle ABC", points, _ring("ABC"), "ABC", [first, second], third, thinking)


def _exterior(parameters: tuple, rng: random.Random) -> Figure:
    a, b, variant = parameters
    points = dict(zip("ABC", _triangle(a, b), strict=True))
    points["D"] = points["C"] + rng.uniform(0.35, 0.8) * (points["C"] - points["B"])
    at_a, at_b = Angle("A", a, ("B", "A", "C")), Angle("B", b, ("A", "B", "C"))
    outside = Angle("ACD", a + b, ("A", "C", "D"))
    given, asked = ([at_a, at_b], outside) if variant == "outside" else ([outside, at_a], at_b)
    thinking = f"{a}+{b}" if variant == "outside" else f"{a + b}-{a}"
    return Figure(
        "BC extends to D", points, [*_ring("ABC"), ("C", "D")], "ABCD", given, asked, thinking
    )


def _isosceles(parameters: tuple, rng: random.Random) -> Figure:
    base, variant = parameters
    points = dict(zip("BCA", _triangle(base, base), strict=True))
    apex, foot = Angle("A", 180 - 2 * base, ("B", "A", "C")), Angle("B", base, ("A", "B", "C"))
    given, asked = (apex, foot) if variant == "base" else (foot, apex)
    thinking = (
        f"180-{apex.degrees}={2 * base}" if variant == "base" else f"{base}+{base}={2 * base}"
    )
    return Figure("AB = AC", points, _ring("ABC"), "ABC", [given], asked, thinking)


def _parallel(parameters: tuple, rng: random.Random) -> Figure:
    size, variant = parameters
    across = _direction(size)
    gap = rng.uniform(0.9, 1.4)
    points = {"P": 0j, "Q": gap * across, "c": (gap + 0.6) * across, "c'": -0.6 * across}
    for foot, line in ("Pa", "Qb"):
        points[line] = points[foot] + rng.uniform(0.9, 1.5)
        points[line + "'"] = points[foot] - rng.uniform(0.9, 1.5)
    first = Angle("1", size, ("a", "P", "Q"))
    second = {
        "corresponding": Angle("2", size, ("b", "Q", "c")),
        "alternate": Angle("2", size, ("b'", "Q", "P")),
        "co-interior": Angle("2", 180 - size, ("b", "Q", "P")),
    }[variant]
    segments = [
        ("a'", "P"),
        ("P", "a"),
        ("b'", "Q"),
        ("Q", "b"),
        ("c'", "P"),
        ("P", "Q"),
        ("Q", "c"),
    ]
    thinking = f"{variant}: " + (f"180-{size}" if variant == "co-interior" else str(size))
    return Figure("a parallel b", points, segments, "ab", [first], second, thinking)


def _bisector(parameters: tuple, rng: random.Random) -> Figure:
    half, variant = parameters
    turns = {"A": 0, "C": half, "B": 2 * half}
    points = {"O": 0j} | {
        name: rng.uniform(0.85, 1.25) * _direction(turn) for name, turn in turns.items()
    }
    low, high = Angle("1", half, ("A", "O", "C")), Angle("2", half, ("C", "O", "B"))
    # The whole angle's text keeps off the bisector and off the other half's mark.
    if variant == "half from half":
        given, asked, thinking = low, high, f"halves: {half}"
    elif variant == "half from whole":
        given, asked, thinking = (
            Angle("1", 2 * half, ("A", "O", "B"), place=0.25),
            high,
            f"{2 * half}/2",
        )
    else:
        given, asked, thinking = (
            low,
            Angle("2", 2 * half, ("A", "O", "B"), place=0.75),
            f"{half}+{half}",
        )
    return Figure(
        "OC bisects angle AOB",
        points,
        [("O", "A"), ("O", "B"), ("O", "C")],
        "ABCO",
        [given],
        asked,
        thinking,
    )


def _inscribed(parameters: tuple, rng: random.Random) -> Figure:
    """A and B on a circle, and C on the major arc, or on the minor arc (variant "minor")."""
    half, variant = parameters
    reach = half * 0.4 if variant == "minor" else (180 - half) * 0.6
    turn = rng.uniform(-reach, reach) + (0 if variant == "minor" else 180)
    points = {"O": 0j, "A": _direction(-half), "B": _direction(half), "C": _direction(turn)}
    central = Angle("AOB", 2 * half, ("A", "O", "B"))
    inscribed = Angle("ACB", 180 - half if variant == "minor" else half, ("A", "C", "B"))
    given, asked = (inscribed, central) if variant == "central" else (central, inscribed)
    thinking = {
        "major": f"{2 * half}/2",
        "minor": f"{2 * half}/2={half},180-{half}",
        "central": f"{half}+{half}",
    }[variant]
    segments = [("O", "A"), ("O", "B"), ("C", "A"), ("C", "B")]
    return Figure(
        "A, B, C are on circle O", points, segments, "ABCO", [given], asked, thinking, circle=True
    )


def _tangent(parameters: tuple, rng: random.Random) -> Figure:
    size, variant = parameters
    points = {"O": 0j, "B": 1 + 0j, "A": 1 + 1j * math.tan(math.radians(size))}
    at_a, at_o = Angle("A", 90 - size, ("O", "A", "B")), Angle("O", size, ("A", "O", "B"))
    given, asked = (at_a, at_o) if variant == "at O" else (at_o, at_a)
    premise, thinking = "AB is tangent to circle O at B", f"90-{given.degrees}"
    return Figure(premise, points, _ring("ABO"), "ABO", [given], asked, thinking, circle=True)


FAMILIES: dict[str, tuple[int, Callable, Callable]] = {
    "third-angle": (1, _two_angles, _third_angle),
    "parallel": (2, _one_angle(40, 140, "corresponding", "alternate", "co-interior"), _parallel),
    "bisector": (2, _one_angle(25, 75, "half from half", "half from whole", "whole"), _bisector),
    "exterior": (3, _ordered_angles, _exterior),
    "isosceles": (3, _one_angle(20, 80, "base", "apex"), _isosceles),
    "inscribed": (3, _one_angle(35, 75, "major", "minor", "central"), _inscribed),
    "tangent": (3, _one_angle(30, 60, "at A", "at O"), _tangent),
}
"""Family: the first difficulty that draws it, its sampler, its painter."""


def _triangle(first: float, second: float) -> tuple[complex, complex, complex]:
    """Corners of a triangle whose angles at the first two are given, in degrees (law of sines)."""
    return (
        0j,
        math.sin(math.radians(first + second)) + 0j,
        math.sin(math.radians(second)) * _direction(first),
    )


def _direction(degrees: float) -> complex:
    return cmath.rect(1, math.radians(degrees))


def _ring(corners: str) -> list[tuple[str, str]]:
    return [(corners[k - 1], corner) for k, corner in enumerate(corners)]


def _paint(figure: Figure, side: int, write_sizes: bool, rng: random.Random) -> Image.Image:
    """Paint the figure on side × side pixels, at a random turn, size and place, in random colours."""
    scale = 4  # drawn larger and shrunk, for smooth edges
    points, radius = _place(figure, side * scale, rng)
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
        # The mark of a whole angle goes outside the marks of its halves.
        arc = side * scale * (0.09 if angle.place == 0.5 else 0.13)
        spot = _mark(
            pen, sides, arc, angle.place, font.getlength(label), mark_ink, max(scale, width // 2)
        )
        _write(pen, spot, label, font, text_ink, paper)
    for letter in figure.letters:
        _write(
            pen, _beside(letter, figure, points, 0.75 * font.size), letter, font, text_ink, paper
        )
    return image.resize((side, side), Image.Resampling.BOX)


def _place(figure: Figure, side: int, rng: random.Random) -> tuple[dict[str, complex], float]:
    """The points in pixels, and the circle's radius, after a random turn, mirror image, scaling and shift."""
    turn, mirror = _direction(rng.uniform(0, 360)), rng.random() < 0.5
    points = {
        name: turn * (point.conjugate() if mirror else point)
        for name, point in figure.points.items()
    }
    extent = list(points.values())
    if figure.circle:
        extent += [points["O"] + step for step in (1, -1, 1j, -1j)]
    low = complex(min(z.real for z in extent), min(z.imag for z in extent))
    size = complex(max(z.real for z in extent), max(z.imag for z in extent)) - low
    margin = 0.11 * side  # room for the letters
    scale = rng.uniform(0.85, 1.0) * (side - 2 * margin) / max(size.real, size.imag)
    shift = complex(
        *(
            margin + rng.random() * (side - 2 * margin - scale * part)
            for part in (size.real, size.imag)
        )
    )
    return {name: shift + scale * (point - low) for name, point in points.items()}, scale


def _mark(
    pen: ImageDraw.ImageDraw,
    sides: list[complex],
    arc: float,
    place: float,
    room: float,
    ink: tuple,
    width: int,
) -> complex:
    """Draw the arc of the angle with corners `sides` (its vertex second); return where a text `room` wide fits."""
    start, vertex, end = sides
    sweep = math.degrees(cmath.phase((end - vertex) / (start - vertex)))  # −180 … 180
    first = math.degrees(cmath.phase(start - vertex))
    reach = min(abs(start - vertex), abs(end - vertex))
    arc = min(arc, 0.5 * reach)
    box = [_xy(vertex - complex(arc, arc)), _xy(vertex + complex(arc, arc))]
    pen.arc(box, min(first, first + sweep), max(first, first + sweep), fill=ink, width=width)
    # In a narrow angle the text moves outwards until it fits between the sides.
    narrow = math.sin(math.radians(abs(sweep)) * min(place, 1 - place))
    distance = max(arc + 0.6 * room, min(0.6 * room / narrow, 0.7 * reach))
    return vertex + distance * _direction(first + place * sweep)


def _beside(letter: str, figure: Figure, points: dict[str, complex], distance: float) -> complex:
    """Where a point's letter stands: away from the segments that meet there."""
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
    """Write a label centred on `spot`, moved inwards where it would leave the image, on a thin rim of paper."""
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
    return point.real, point.imag
