"""Diagrams: figures true to their numbers, however they are placed, and sizes written into them."""

import cmath
import math
import random

import pytest

from mr1_fast.tasks import diagram, geometry


def test_geometry_writes_sizes_into_the_figure():
    figure = geometry.PROBLEM_FAMILIES["third-angle"].build((50, 60), random.Random(0))
    plain, written = (
        diagram.paint(figure, 224, sizes, random.Random(1)) for sizes in (False, True)
    )
    assert plain.tobytes() != written.tobytes()
    figure.given[0].degrees = 51
    assert diagram.paint(figure, 224, False, random.Random(1)).tobytes() == plain.tobytes()
    assert diagram.paint(figure, 224, True, random.Random(1)).tobytes() != written.tobytes()


def measured(points, corners):
    start, vertex, end = (points[name] for name in corners)
    return abs(math.degrees(cmath.phase((end - vertex) / (start - vertex))))


def test_figures_are_turned_mirrored_scaled_and_shifted():
    figure = geometry.PROBLEM_FAMILIES["third-angle"].build((50, 60), random.Random(0))
    placed = [diagram.place(figure, 84, random.Random(seed))[0] for seed in range(200)]
    sides = [points["B"] - points["A"] for points in placed]
    assert {round(cmath.phase(side) / (math.pi / 4)) for side in sides} == set(range(-4, 5))
    assert (
        len(
            {
                cmath.phase((points["C"] - points["A"]) / (points["B"] - points["A"])) > 0
                for points in placed
            }
        )
        == 2
    )
    assert max(map(abs, sides)) > 1.1 * min(map(abs, sides))
    centres = [sum(points.values()) / 3 for points in placed]
    assert max(centre.real for centre in centres) - min(centre.real for centre in centres) > 10


@pytest.mark.parametrize("family", geometry.PROBLEM_FAMILIES)
@pytest.mark.parametrize("step", [1, 5])
def test_figures_are_true_to_their_numbers(family, step):
    sample, build = (
        geometry.PROBLEM_FAMILIES[family].sample,
        geometry.PROBLEM_FAMILIES[family].build,
    )
    for seed in range(300):
        rng = random.Random(seed)
        figure = build(sample(rng, step), rng)
        placed, radius = diagram.place(figure, 84, rng)
        for points in (figure.points, placed):
            for angle in (*figure.given, figure.asked):
                assert measured(points, angle.corners) == pytest.approx(angle.degrees, abs=1e-6)
        assert all(0 < part < 84 for point in placed.values() for part in (point.real, point.imag))
        p = placed
        if family == "parallel":
            assert ((p["a"] - p["a'"]) / (p["b"] - p["b'"])).imag == pytest.approx(0, abs=1e-9)
        if family == "bisector":
            assert measured(p, "AOC") == pytest.approx(measured(p, "COB"))
        if family == "isosceles":
            assert abs(p["A"] - p["B"]) == pytest.approx(abs(p["A"] - p["C"]))
        if family == "exterior":
            assert measured(p, "BCD") == pytest.approx(180)
        if family == "inscribed":
            assert all(abs(p[name] - p["O"]) == pytest.approx(radius) for name in "ABC")
        if family == "tangent":
            assert abs(p["B"] - p["O"]) == pytest.approx(radius) and measured(
                p, "OBA"
            ) == pytest.approx(90)
