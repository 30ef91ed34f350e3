"""Angles in drawn diagrams.

An item is a short problem in GeoQA's style, a figure that is true to its numbers, and an answer
such as `145°`.

| difficulty | families | numbers | pixels |
|---|---|---|---|
| 1 | third angle of a triangle | multiples of 5, in the problem | 84×84 |
| 2 | + parallel lines, bisector; only the figure tells angle 1 from 2 | as 1 | 84×84 |
| 3 | + exterior angle, isosceles triangle, circle angles, tangent | integers, as 1 | 168×168 |
| 4 | as 3 | integers, in the figure only | 224×224 |

A family of problems samples its parameters (angles in degrees, then the variant) and builds a
Figure from them, which diagram.py paints.
"""

import math
import random
from collections.abc import Callable
from dataclasses import dataclass

from ..errors import UserError
from ..types import Example
from .diagram import Angle, Figure, direction, paint
from .split import draw_for_split

SIDES = {1: 84, 2: 84, 3: 168, 4: 224}
"""Width and height of the image in pixels, by difficulty: multiples of the 28 pixels of an image
token of Qwen2-VL."""
SMALLEST = {5: 10, 1: 30}
"""The smallest angle of a triangle with two angles given or asked, by the step between sizes, in
degrees.

It is larger for integers, since these may be written into the figure, which takes space.
"""


def draw(split: str, seed: int, index: int, difficulty: int = 1, painted: bool = True) -> Example:
    """Draw item `index` of a split ("train", "validation" or "test"); the same arguments give the
    same item.

    Parameters (family, angles, variant) belong to exactly one split, at every difficulty. Raises
    UserError for a difficulty outside 1–4.
    """
    if difficulty not in SIDES:
        raise UserError(
            f"difficulty is {difficulty}, but geometry has difficulties 1 to {max(SIDES)}: "
            "choose one."
        )
    families = [
        name for name, family in PROBLEM_FAMILIES.items() if family.first_difficulty <= difficulty
    ]
    step = 5 if difficulty <= 2 else 1

    def sample(rng: random.Random) -> tuple:
        name = rng.choice(families)
        return (name, *PROBLEM_FAMILIES[name].sample(rng, step))

    parameters, rng = draw_for_split(sample, split, ("geometry", seed, index, difficulty))
    name, *sizes_and_variant = parameters
    figure = PROBLEM_FAMILIES[name].build(tuple(sizes_and_variant), rng)
    sizes_in_figure = difficulty == 4
    told = [] if sizes_in_figure else figure.given
    given = [f"angle {angle.name} = {angle.degrees}" for angle in told]
    return Example(
        problem=", ".join([figure.premise, *given, f"angle {figure.asked.name} = ()"]),
        images=(paint(figure, SIDES[difficulty], sizes_in_figure, rng),) if painted else (),
        solution=f"{figure.asked.degrees}°",
        thinking=figure.thinking,
        key=" ".join(map(str, parameters)),
    )


# Samplers turn a generator and the step between sizes, in degrees, into parameters.


def _two_angles(rng: random.Random, step: int) -> tuple[int, int]:
    """Sample two angles of a triangle, smaller first: 60 and 50 share a split with 50 and 60."""
    smallest = SMALLEST[step]
    while True:
        first, second = (rng.randrange(smallest, 181 - 2 * smallest, step) for _ in range(2))
        if first + second <= 180 - smallest:
            return min(first, second), max(first, second)


def _ordered_angles(rng: random.Random, step: int) -> tuple[int, int, str]:
    """Sample two angles of a triangle, and whether the exterior angle is asked or given."""
    return (*rng.sample(_two_angles(rng, step), 2), rng.choice(("outside", "remote")))


def _one_angle(
    low: int, high: int, *variants: str
) -> Callable[[random.Random, int], tuple[int, str]]:
    """Return a sampler of an angle from `low` to `high` degrees and of one of the variants."""
    return lambda rng, step: (rng.randrange(low, high + 1, step), rng.choice(variants))


# Builders turn parameters and a generator into a figure.


def _third_angle(parameters: tuple, rng: random.Random) -> Figure:
    """Ask the third angle of a triangle, of which two are given."""
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
    """Ask the exterior angle of a triangle (variant "outside"), or a remote angle from it."""
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
    """Ask the base angle of an isosceles triangle from its apex (variant "base"), or the apex."""
    base, variant = parameters
    points = dict(zip("BCA", _triangle(base, base), strict=True))
    apex, foot = Angle("A", 180 - 2 * base, ("B", "A", "C")), Angle("B", base, ("A", "B", "C"))
    given, asked = (apex, foot) if variant == "base" else (foot, apex)
    thinking = (
        f"180-{apex.degrees}={2 * base}" if variant == "base" else f"{base}+{base}={2 * base}"
    )
    return Figure("AB = AC", points, _ring("ABC"), "ABC", [given], asked, thinking)


def _parallel(parameters: tuple, rng: random.Random) -> Figure:
    """Ask an angle between a line and the second of two parallels that it crosses."""
    size, variant = parameters
    across = direction(size)
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
    """Ask a half of a bisected angle from the other half or the whole, or the whole from a half."""
    half, variant = parameters
    turns = {"A": 0, "C": half, "B": 2 * half}
    points = {"O": 0j} | {
        name: rng.uniform(0.85, 1.25) * direction(turn) for name, turn in turns.items()
    }
    low, high = Angle("1", half, ("A", "O", "C")), Angle("2", half, ("C", "O", "B"))
    # The text of the whole angle must stay clear of the bisector and of the other half's mark.
    if variant == "half from half":
        given, asked, thinking = low, high, f"halves: {half}"
    elif variant == "half from whole":
        whole = Angle("1", 2 * half, ("A", "O", "B"), place=0.25)
        given, asked, thinking = whole, high, f"{2 * half}/2"
    else:
        whole = Angle("2", 2 * half, ("A", "O", "B"), place=0.75)
        given, asked, thinking = low, whole, f"{half}+{half}"
    segments = [("O", "A"), ("O", "B"), ("O", "C")]
    return Figure("OC bisects angle AOB", points, segments, "ABCO", [given], asked, thinking)


def _inscribed(parameters: tuple, rng: random.Random) -> Figure:
    """Ask the inscribed angle over a chord AB from the central one, or the central one.

    C is on the major arc or, in the variant "minor", on the minor arc.
    """
    half, variant = parameters
    reach = half * 0.4 if variant == "minor" else (180 - half) * 0.6
    turn = rng.uniform(-reach, reach) + (0 if variant == "minor" else 180)
    points = {"O": 0j, "A": direction(-half), "B": direction(half), "C": direction(turn)}
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
    """Ask an angle of the right triangle that a tangent makes with the circle's centre."""
    size, variant = parameters
    points = {"O": 0j, "B": 1 + 0j, "A": 1 + 1j * math.tan(math.radians(size))}
    at_a, at_o = Angle("A", 90 - size, ("O", "A", "B")), Angle("O", size, ("A", "O", "B"))
    given, asked = (at_a, at_o) if variant == "at O" else (at_o, at_a)
    premise, thinking = "AB is tangent to circle O at B", f"90-{given.degrees}"
    return Figure(premise, points, _ring("ABO"), "ABO", [given], asked, thinking, circle=True)


@dataclass(frozen=True)
class Family:
    """A kind of problem."""

    first_difficulty: int
    """The lowest difficulty that draws it."""
    sample: Callable[[random.Random, int], tuple]
    """Draws its parameters: (generator, step between sizes in degrees) to (angles…, variant)."""
    build: Callable[[tuple, random.Random], Figure]
    """Makes its figure: (parameters, generator) to Figure."""


PROBLEM_FAMILIES = {
    "third-angle": Family(1, _two_angles, _third_angle),
    "parallel": Family(
        2, _one_angle(40, 140, "corresponding", "alternate", "co-interior"), _parallel
    ),
    "bisector": Family(
        2, _one_angle(25, 75, "half from half", "half from whole", "whole"), _bisector
    ),
    "exterior": Family(3, _ordered_angles, _exterior),
    "isosceles": Family(3, _one_angle(20, 80, "base", "apex"), _isosceles),
    "inscribed": Family(3, _one_angle(35, 75, "major", "minor", "central"), _inscribed),
    "tangent": Family(3, _one_angle(30, 60, "at A", "at O"), _tangent),
}
"""The families by name."""


def _triangle(first: float, second: float) -> tuple[complex, complex, complex]:
    """Return a triangle's corners from the first two angles, in degrees (law of sines)."""
    return (
        0j,
        math.sin(math.radians(first + second)) + 0j,
        math.sin(math.radians(second)) * direction(first),
    )


def _ring(corners: str) -> list[tuple[str, str]]:
    """Return the sides of a polygon."""
    return [(corners[k - 1], corner) for k, corner in enumerate(corners)]
