"""Formulas: what is read as a whole, its value, its unit, and when two are the same."""

from fractions import Fraction

import pytest

from mr1_fast.rewards.answers.formula import Formula, difference, proportional
from mr1_fast.rewards.answers.numbers import Unreadable


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1+2*3", "7"),
        ("(1+2)*3", "9"),
        ("2-3-4", "-5"),
        ("8/4/2", "1"),
        ("2^3^2", "512"),
        ("-2^2", "-4"),
        ("(-2)^2", "4"),
        ("2^-1", "1/2"),
        ("2^{-1}", "1/2"),
        (r"\frac{1}{2}+\frac{1}{3}", "5/6"),
        ("1 1/2", "3/2"),
        (r"1\frac{1}{2}", "3/2"),
        (r"3\frac{9}{3}", "9"),
        ("√{9}", "3"),
        (r"\sqrt[3]{27}", "3"),
        ("∛27", "3"),
        ("2√(4)", "4"),
        ("3!", "6"),
        ("50%", "50"),
        ("12 cm", "12"),
    ],
)
def test_values(text, value):
    assert Formula(text).values[0].value == Fraction(value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        "word",
        "ab",
        "1 2",
        "1.2.3",
        "2(3)",
        "(2)(3)",
        "2{3}",
        "1+",
        "+-1",
        "(1",
        "1)",
        "()",
        "√",
        "1/0",
        "√{-1}",
        "x2",
        "3 apples",
        "2 cm + 3 m",
        "2 cm 3 m",
        "2√2-2 cm",
        "50% of 3",
        r"\frac{1}",
        r"\foo{1}",
        "1?",
        "1_2",
        "sin^{-1} 1",
        "(" * 60 + "1" + ")" * 60,
        "99^999^2",
    ],
)
def test_what_is_not_wholly_a_formula_is_refused(text):
    with pytest.raises(Unreadable):
        Formula(text)


def test_letters_are_compared_by_value():
    for a, b in [("(x+y)^2", "x^2+2xy+y^2"), ("x_1+x_{2}", "x_{2}+x_1"), ("√(x)√(x)", "x")]:
        assert Formula(a).has_letters
        assert Formula(a).same(Formula(b))
    for a, b in [("x+y", "x-y"), ("x", "X"), ("x_1", "x_2"), ("x'", "x"), ("√(x^2)", "x")]:
        assert not Formula(a).same(Formula(b))


def test_a_unit_may_be_left_out_but_not_exchanged():
    assert Formula("12 cm").same(Formula("0.12 m"))
    assert Formula("12 cm").same(Formula("12"))
    assert not Formula("12 cm").same(Formula("12 m"))
    assert not Formula("4s").same(Formula("4"))  # four times s?
    assert Formula("4s").same(Formula("4 seconds"))
    assert Formula("4 s").same(Formula("4"))
    assert Formula("πr^2h").has_letters


def test_percent_is_a_hundredth_or_left_out():
    assert Formula("50%").same(Formula("0.5"))
    assert Formula("50%").same(Formula("50"))
    assert Formula("0.5%").same(Formula("0.005"))
    assert not Formula("0.5%").same(Formula("0.5"))
    assert not Formula("50%").same(Formula("50 cm"))


def test_equations_are_proportional_differences():
    a, b = difference("2x", "6"), difference("3", "x")
    assert proportional([a], [b])
    assert not proportional([a], [b], negative=False)
    assert not proportional([a], [difference("2x", "5")])
    assert not proportional([difference("x", "x")], [difference("y", "y")])
    with pytest.raises(Unreadable):
        difference("x)", "(y")
