"""Geometry: enough problems, true answers, and the difficulty as documented."""

import re

import pytest

from mr1_fast.errors import UserError
from mr1_fast.tasks import geometry
from mr1_fast.tasks.split import SPLITS, split_of


@pytest.mark.parametrize("drawn", ["geometry"], indirect=True)
def test_geometry_has_enough_problems_at_difficulty_1_and_draws_all(drawn):
    sizes = range(10, 180, 5)
    pairs = {(a, b) for a in sizes for b in sizes if a <= b and a + b <= 170}
    assert len(pairs) == 256
    for split, least in zip(SPLITS, (170, 25, 50), strict=True):
        possible = {
            f"third-angle {a} {b}" for a, b in pairs if split_of(("third-angle", a, b)) == split
        }
        assert len(possible) >= least
        found = {example.key for example in drawn[split]}
        assert found <= possible and len(found) > 0.99 * len(possible)


@pytest.mark.parametrize("drawn", ["geometry"], indirect=True)
def test_geometry_asks_no_pair_of_training_in_another_order(drawn):
    pairs = [
        {frozenset(re.findall(r"\d+", example.problem)) for example in drawn[split]}
        for split in SPLITS
    ]
    assert not pairs[0] & pairs[1] and not pairs[0] & pairs[2] and not pairs[1] & pairs[2]


def expected_answer(key):
    """The answer of a geometry item, from its parameters alone."""
    family, *sizes = key.split(" ", 2)
    if family in ("third-angle", "exterior"):
        first, second, *variant = [
            part if not part.isdigit() else int(part) for part in " ".join(sizes).split()
        ]
        return {(): 180 - first - second, ("outside",): first + second, ("remote",): second}[
            tuple(variant)
        ]
    size, variant = int(sizes[0]), sizes[1]
    return {
        "parallel": {"corresponding": size, "alternate": size, "co-interior": 180 - size},
        "bisector": {"half from half": size, "half from whole": size, "whole": 2 * size},
        "isosceles": {"base": size, "apex": 180 - 2 * size},
        "inscribed": {"major": size, "minor": 180 - size, "central": 2 * size},
        "tangent": {"at A": 90 - size, "at O": size},
    }[family][variant]


@pytest.mark.parametrize("difficulty", geometry.SIDES)
def test_geometry_answers_and_the_dial(difficulty):
    examples = [geometry.draw("train", 2, index, difficulty) for index in range(400)]
    assert all(example.solution == f"{expected_answer(example.key)}°" for example in examples)
    families = {example.key.split(" ")[0] for example in examples}
    assert families == {
        name
        for name, family in geometry.PROBLEM_FAMILIES.items()
        if family.first_difficulty <= difficulty
    }
    numbers = [
        int(size) for example in examples for size in re.findall(r"= (\d+)", example.problem)
    ]
    assert bool(numbers) == (difficulty < 4)
    assert all(size % 5 == 0 for size in numbers) == (difficulty in (1, 2, 4))
    assert {example.images[0].width for example in examples} == {geometry.SIDES[difficulty]}
    if difficulty == 1:
        assert max(len(example.problem) for example in examples) < 60
        assert max(len(example.thinking) for example in examples) <= 14
    if difficulty == 2:  # the same words and numbers, different answers: only the figure tells
        answers = {}
        for example in examples:
            answers.setdefault(example.problem, set()).add(example.solution)
        assert any(len(found) > 1 for found in answers.values())


def test_geometry_rejects_an_unknown_difficulty():
    with pytest.raises(UserError, match="difficulty is 5, but geometry has difficulties 1 to 4"):
        geometry.draw("train", 0, 0, 5)
