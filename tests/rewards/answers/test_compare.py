"""Comparing words, and showing texts."""

from mr1_fast.rewards.answers.compare import SHOWN_CHARS, folded, shown


def test_case_and_articles_are_folded_in_words():
    for text in ("red ball", "A red ball", "the Red Ball.", "an  red ball!"):
        assert folded(text) == "red ball"
    assert folded("type A cell") != folded("type cell")
    assert folded("the") == "the"


def test_symbols_keep_their_case():
    assert folded("5 mW") != folded("5 MW")
    assert folded("5 Apples") == folded("5 apples")
    assert folded("x ^ X") == "x^X" != folded("x ^ x")


def test_what_is_shown_is_short_and_printable():
    assert shown("a\x1b[1m\nb") == "a�[1m�b"
    assert len(shown("a" * 1000)) == SHOWN_CHARS
