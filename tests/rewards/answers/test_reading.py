"""Readers: each text is one kind of thing as a whole."""

from datetime import date

import pytest

from mr1_fast.rewards.answers.formula import Formula
from mr1_fast.rewards.answers.kinds import (
    Choice,
    Clock,
    Infinity,
    Named,
    Ratio,
    Relation,
    Several,
    Words,
)
from mr1_fast.rewards.answers.notation import normalise
from mr1_fast.rewards.answers.reading import MAX_ITEMS, read


@pytest.mark.parametrize(
    ("kind", "texts"),
    [
        (
            Formula,
            ["3", "1,234", "3 cm", "2x+3", "(3)", "[3]", "= 3", "2+2 = 4", "the answer is 3"],
        ),
        (Infinity, ["∞", "-\\infty"]),
        (Choice, ["B", "(b)", "B.", "option B", "B. 145°", "[B]", "B: the red one"]),
        (Named, ["x = 5", "5 = x", "∠A = 50°", "f(x) = 2y", "area = 3", "x ≈ 3", "AB = 2·3 = 6"]),
        (Relation, ["2x = 6", "x > 3", "3 ≤ y", "x ≠ 5", "x = 2x + 1"]),
        (
            Several,
            ["3, 4", "3 or 4", "(3, 4)", "{3, 4}", "[3, 4)", "±3", "3;4", "x=3, y=4", "B, C"],
        ),
        (Clock, ["10:45", "9:05 pm", "1:30:00"]),
        (Ratio, ["1:3", "√2:1", "a:b", "3×4", "3x4x5"]),
        (date, ["2024-01-06", "Jan. 6, 2024"]),
        (
            Words,
            [
                "red",
                "3 apples",
                "3-4",
                "7 - 2",
                "1/2/2024",
                "2024-13-45",
                "3 4",
                "x > 3 > y",
                "5 = 6",
            ],
        ),
    ],
)
def test_kinds(kind, texts):
    for text in texts:
        assert isinstance(read(normalise(text)), kind), text


def test_what_is_read():
    assert read("10:45 pm") == Clock(22, 45, 0)
    assert read("6 January 2024") == date(2024, 1, 6)
    assert read("yes") == Words("yes")
    choice = read("b. 145°")
    assert (choice.letter, choice.rest.values[0].value) == ("B", 145)
    pair = read("[3, 4)")
    assert (pair.opening, pair.closing, len(pair.items), pair.is_ordered) == ("[", ")", 2, True)
    assert not read("3, 4").is_ordered
    assert read("x = 3, y = 4").is_ordered
    assert not read("x = 3 or x = 4").is_ordered


def test_two_letters_are_no_choice():
    for text in ("B. C", "B. not C", "C. B is wrong", "A. 3 B. 4", "B or C", "B/C", "(A)(B)"):
        assert not isinstance(read(text), Choice), text


def test_a_calculation_gives_one_number_or_none():
    assert read("AB = 2*3 = 6 cm").value.dimensions == {"length": 1}
    assert read("2√3 ≈ 3.46 cm").dimensions == {"length": 1}
    assert isinstance(read("AB = 2*3 = 7"), Words)
    assert isinstance(read("2√3 ≈ 4"), Words)
    for text in ("2x = 2*3 = 2x", "2x = 3+3 = 6", "6 ≈ 2x", "x = 6 = 2y", "2x ≈ 6"):
        assert isinstance(read(text), Words), text
    assert read("x = 2y = 6").value.values[0].value == 6


def test_very_long_or_deep_lists_are_words():
    assert isinstance(read(",".join("3" * MAX_ITEMS)), Several)
    assert isinstance(read(",".join("3" * (MAX_ITEMS + 1))), Words)
    assert isinstance(read("(1," * 300 + "1" + ")" * 300), Several)
    assert isinstance(read("(" * 300 + "1" + ")" * 300), Words)
