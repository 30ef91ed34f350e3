"""Numbers: exact where they can be, and never too large to compute."""

import math
from fractions import Fraction

import pytest

from mr1_fast.rewards.answers.numbers import (
    PI,
    Number,
    Undefined,
    Unreadable,
    decimal,
    integer,
    same_number,
    written,
)

TWO, THREE = integer(2), integer(3)


def test_roots_of_squares_and_powers_of_fractions_are_exact():
    assert integer(49).root(2).value == 7
    assert Number(Fraction(8, 27)).root(3).value == Fraction(2, 3)
    assert integer(-8).root(3).value == -2
    assert (written("1.5") ** integer(-2)).value == Fraction(4, 9)
    assert integer(5).factorial().value == 120


def test_roots_and_pi_have_sixty_digits():
    root = TWO.root(2)
    assert same_number(root * root, TWO)
    assert same_number(root * THREE.root(2), integer(6).root(2))
    assert same_number(integer(12).root(2), TWO * THREE.root(2))
    assert (root * root + -TWO).value == 0
    assert not same_number(integer(10**25) * root, integer(10**25) * root + integer(1))
    assert math.isclose(float(decimal(PI)), math.pi)


@pytest.mark.parametrize(
    ("a", "b", "same"),
    [
        ("3", "3.0", True),
        ("3", "2.9999999999999996", True),
        ("3", "3.0000000001", False),
        ("1000000000000", "1000000000001", False),
        ("1.5e3", "1500", True),
        ("0", "0.0000000000001", False),
        ("0", "0.0", True),
    ],
)
def test_written_decimals_may_differ_by_floating_point_noise(a, b, same):
    assert same_number(written(a), written(b)) == same


def test_a_decimal_stands_for_a_fraction_or_root_to_six_digits():
    third, root = Number(Fraction(1, 3)), TWO.root(2)
    assert same_number(written("0.3333333"), third)
    assert not same_number(written("0.33333"), third)
    assert same_number(written("1.414214"), root)
    assert not same_number(written("1.4142"), root)
    assert not same_number(Number(Fraction(333333333, 1000000000)), third)  # not a written decimal


def test_functions_are_compared_to_nine_digits():
    assert same_number((PI / integer(6)).apply(math.sin), Number(Fraction(1, 2)))
    assert (PI / TWO).apply(math.cos).value == 0


@pytest.mark.parametrize(
    "compute",
    [
        lambda: integer(9) ** (integer(9) ** integer(99)),
        lambda: integer(10) ** integer(5000),
        lambda: written("1e2000"),
        lambda: TWO ** (integer(10**900) * TWO.root(2)),
        lambda: (TWO.root(2) / integer(10**1000)) ** integer(3000),
        lambda: integer(10**1000) * integer(10**1000),
        lambda: integer(10**1000) * TWO.root(2) * integer(10**1000),
        lambda: integer(101).factorial(),
    ],
)
def test_what_would_be_too_large_is_refused(compute):
    with pytest.raises(Unreadable):
        compute()


@pytest.mark.parametrize(
    "compute",
    [
        lambda: TWO / integer(0),
        lambda: integer(0) ** integer(0),
        lambda: integer(-2).root(2),
        lambda: integer(-2) ** TWO.root(2),
        lambda: integer(-1).apply(math.log),
        lambda: written("0.5").factorial(),
    ],
)
def test_what_has_no_value_is_undefined(compute):
    with pytest.raises(Undefined):
        compute()
