"""Labels, which are not computed: two that come to the same number are not the same."""

import pytest

from mr1_fast.rewards import judge
from mr1_fast.rewards.answers import kind_of
from mr1_fast.rewards.answers.labels import is_label

DIFFERENT = [
    ("1.5-2.5", "2.5-3.5"),
    ("20-30", "-10"),
    ("1-3-2-4", "1-2-3-4"),
    ("1-800-555-1234", "1-555-800-1234"),
    ("1/2-3/4", "1/4-1/2"),
    ("5K-10K", "10K-15K"),
    ("5 m - 10 m", "10 m - 15 m"),
    ("$5-$10", "$10-$15"),
    ("-5-10", "-10-5"),
    ("9:05-10:00", "9:10-15:00"),
    ("1/3/2/4", "1/2/3/4"),
    ("B-C-A", "B-A-C"),
    ("A/C/B", "A/B/C"),
    ("D C A B", "A B C D"),
    ("N S E W", "E W N S"),
    ("is it", "it is"),
    ("12 AB", "12 BA"),
    ("1st", "1ts"),
    ("No-On", "0"),
]


@pytest.mark.parametrize("pair", DIFFERENT, ids=str)
def test_labels_that_come_to_the_same_are_different(pair):
    for answer, solution in (pair, pair[::-1]):
        assert not judge(answer, solution).right
        assert judge(answer, answer).right


@pytest.mark.parametrize(
    "pair",
    [
        ("20 – 30", "20-30"),
        ("1,000-2,000", "1000 - 2000"),
        ("Wi-Fi", "wi-fi"),
        ("N/A", "n/a"),
        ("1ST", "1st"),
        ("ad - bc", "ad-bc"),
        ("B - C - A", "B-C-A"),
    ],
    ids=str,
)
def test_a_label_may_be_written_with_other_spaces_and_capitals(pair):
    for answer, solution in (pair, pair[::-1]):
        assert judge(answer, solution).right


@pytest.mark.parametrize(
    "formula",
    [
        "5-√2",
        "x-y",
        "x y",
        "ln x",
        "x ln x",
        "a/b",
        "1.5/2",
        "AB/CD",
        "3x-2",
        "-3/4",
        "10^3-1",
        "m/s",
    ],
)
def test_calculations_are_no_labels(formula):
    assert not is_label(formula)
    assert kind_of(formula) in ("number", "expression")


def test_a_quotient_of_decimals_is_a_number():
    assert judge("1.5/2", "0.75").right
