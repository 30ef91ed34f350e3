"""Units: their names, products and powers."""

from fractions import Fraction

import pytest

from mr1_fast.rewards.answers.units import UNITS, read_units, unit_name


@pytest.mark.parametrize(
    ("tokens", "dimensions", "size"),
    [
        ("cm", {"length": 1}, "1/100"),
        ("cm ^ 2", {"length": 2}, "1/10000"),
        ("cm ^ { 2 }", {"length": 2}, "1/10000"),
        ("square meters", {"length": 2}, "1"),
        ("sq . cm", {"length": 2}, "1/10000"),
        ("cm squared", {"length": 2}, "1/10000"),
        ("平方厘米", {"length": 2}, "1/10000"),
        ("km / h", {"length": 1, "time": -1}, "1000/3600"),
        ("m s ^ { - 2 }", {"length": 1, "time": -2}, "1"),
        ("km per hour", {"length": 1, "time": -1}, "1000/3600"),
        ("%", {"percent": 1}, "1/100"),
    ],
)
def test_units_are_read_as_a_whole(tokens, dimensions, size):
    found = read_units(tokens.split())
    assert found is not None
    assert (found[0], found[1].value) == (dimensions, Fraction(size))


@pytest.mark.parametrize(
    "tokens",
    [
        "",
        "apples",
        "cm apples",
        "cm /",
        "cm ^",
        "cm ^ 22",
        "cm ^ x",
        "/ cm",
        "cm cm",
        "% %",
        "square",
    ],
)
def test_what_is_not_wholly_a_unit_is_none(tokens):
    assert read_units(tokens.split()) is None


def test_symbols_keep_their_case_and_words_do_not():
    assert unit_name("Meters") == "meters"
    assert unit_name("CM") == "cm"
    assert unit_name("m") == "m"
    assert [unit_name(word) for word in ("M", "Mm", "KPA", "x", "t")] == [None] * 5


def test_no_name_stands_for_two_units():
    from mr1_fast.rewards.answers.units import _TABLE

    names = [name for line in _TABLE for name in line[0].split()]
    assert len(names) == len(set(names)) <= len(UNITS)
