"""One way of writing: what becomes of LaTeX, Markdown and Unicode."""

import random

import pytest

from mr1_fast.rewards.answers.notation import normalise

from ...data.hostile import random_strings


@pytest.mark.parametrize(
    ("text", "plain"),
    [
        ("  3 \n", "3"),
        ("$3$", "3"),
        (r"\[ 3 \]", "3"),
        (r"\boxed{\text{B}}", "B"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{3}\boxed{4}", "3 4"),
        (r"12\,\mathrm{cm}^2", "12 cm ^2"),
        ("**73**", "73"),
        ("*73* `74` __75__", "73 74 75"),
        ("2*3*4", "2*3*4"),
        ("2**3**2", "2**3**2"),
        ("cm²", "cm^{2}"),
        ("10⁻³", "10^{-3}"),
        ("x₁₂", "x_{12}"),
        ("5cm^2^", "5cm^{2}"),
        ("5 cm2", "5 cm^{2}"),
        ("60^{\\circ}", "60°"),
        ("20℃", "20°C"),
        ("½", "1/2"),
        ("1½", "1 1/2"),
        ("\u2212３", "-3"),
        ("٣", "3"),
        ("（３，４）", "(3,4)"),
        ("1∶3", "1:3"),
        ("1\u202f234\u202f567", "1234567"),
        (r"1{,}234", "1234"),
        ("1\u200b2", "12"),
        (r"\frac12", r"\frac{1}{2}"),
        (r"\tfrac1{23}", r"\frac{1}{23}"),
        (r"2\pi r \times \theta", "2πr ×θ"),
        (r"\left( 3 \right]", "( 3 ]"),
        (r"\{3\}", "⦃3⦄"),
        ("3 >= x", "3 ≥ x"),
        ("'yes'.", "yes"),
        ("3.", "3"),
        ("3...", "3..."),
        ("3。", "3"),
        ("{3}", "3"),
        ("{1,234}", "{1,234}"),
        ("$5", "dollar 5"),
        (r"\$5", "dollar 5"),
        (r"50\%", "50%"),
    ],
)
def test_one_way_of_writing(text, plain):
    assert normalise(text) == plain


def test_a_second_time_changes_nothing_for_words_and_numbers():
    for text in ("2√{3}cm^{2}", "the red ball", "x = 5", "(3, 4)", "10:45"):
        assert normalise(normalise(text)) == normalise(text) == text


def test_any_text_can_be_normalised():
    for text in random_strings(2000, random.Random(5)):
        assert "\n" not in normalise(text)
