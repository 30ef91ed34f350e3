"""Comparing what was read in an answer with what was read in the solution."""

import re

from .formula import Formula, proportional
from .kinds import Choice, Named, Ratio, Reading, Relation, Several, Words

SHOWN_CHARS = 60
"""How much of a text a reason shows."""


def same(a: Reading, b: Reading) -> bool:
    """Return whether two readings say the same; the order of the two does not matter."""
    if isinstance(a, Choice) or isinstance(b, Choice):
        return _same_choice(a, b)
    if isinstance(a, Named) or isinstance(b, Named):
        return _same_named(a, b)
    if isinstance(a, Several) and isinstance(b, Words):
        return _same_letters(a, b)
    if isinstance(a, Words) and isinstance(b, Several):
        return _same_letters(b, a)
    if type(a) is not type(b):
        return False
    if isinstance(a, Formula):
        return a.same(b)
    if isinstance(a, Words):
        return folded(a.text) == folded(b.text)
    if isinstance(a, Relation):
        is_equality = a.sign in "=≠"
        return a.sign == b.sign and proportional([a.difference], [b.difference], is_equality)
    if isinstance(a, Ratio):
        if a.sign != b.sign:
            return False
        if a.sign == "×":
            return len(a.parts) == len(b.parts) and all(map(same, a.parts, b.parts))
        return proportional(list(a.parts), list(b.parts), negative=False)
    if isinstance(a, Several):
        return _same_several(a, b)
    return a == b  # Infinity, Clock, date


def _same_choice(a: Reading, b: Reading) -> bool:
    """Compare letters, and the options' texts where both are written.

    A text without a letter equals the text of an option, whose letter nobody can check.
    """
    if isinstance(a, Choice) and isinstance(b, Choice):
        if a.letter != b.letter:
            return False
        return a.rest is None or b.rest is None or same(a.rest, b.rest)
    choice, other = (a, b) if isinstance(a, Choice) else (b, a)
    return choice.rest is not None and same(choice.rest, other)


def _same_named(a: Reading, b: Reading) -> bool:
    """Compare values, and names where both have one; `y = 2x` may also be an equation."""
    if isinstance(a, Named) and isinstance(b, Named):
        return a.name == b.name and same(a.value, b.value)
    named, other = (a, b) if isinstance(a, Named) else (b, a)
    if isinstance(other, Relation):
        return named.relation is not None and same(named.relation, other)
    return same(named.value, other)


def _same_letters(choices: Several, word: Words) -> bool:
    """Return whether a word such as `AC` names the chosen options, and no others."""
    letters = [item.letter for item in choices.items if isinstance(item, Choice) and not item.rest]
    is_all = len(letters) == len(choices.items)
    return is_all and not choices.opening and sorted(letters) == sorted(word.text)


def _same_several(a: Several, b: Several) -> bool:
    a, b = _as_tuple(a, b), _as_tuple(b, a)
    if len(a.items) != len(b.items):
        return False
    if not _same_brackets(a, b):
        return False
    names_both = all(isinstance(item, Named) for item in a.items + b.items)
    if (a.is_ordered or b.is_ordered) and not names_both:
        return all(map(same, a.items, b.items))
    left = list(b.items)
    for item in a.items:
        match = next((place for place, other in enumerate(left) if same(item, other)), None)
        if match is None:
            return False
        del left[match]
    return True


def _as_tuple(a: Several, b: Several) -> Several:
    """Return `x = 3, y = 4` as (3, 4) where b is such a tuple."""
    is_system = not a.opening and a.is_ordered and all(isinstance(x, Named) for x in a.items)
    if not is_system or b.opening != "(":
        return a
    return Several(tuple(sorted(a.items, key=lambda item: item.name)), "(", ")")


def _same_brackets(a: Several, b: Several) -> bool:
    """Return whether the brackets say the same.

    Two items in brackets may be the ends of an interval, so their brackets count. Longer lists may
    have any brackets or none.
    """
    if "{" in (a.opening, b.opening):
        return {a.opening, b.opening} <= {"{", ""}
    return len(a.items) != 2 or (a.opening, a.closing) == (b.opening, b.closing)


_ARTICLE = re.compile(r"^(?:[Aa]|[Aa]n|[Tt]he) (?= ?\w)|(?<= )(?:a|an|the) (?= ?\w)")
_FORMULA_SIGN = re.compile(r"[\\^_=<>*√|≤≥≠±]")
_NO_SYMBOL = re.compile(r"(?<![^\W_])(?<!\d )[^\W\d_]+|[^\W\d_]{4,}|(?<=\d)(?i:st|nd|rd|th)(?!\w)")
_FULL_STOP = re.compile(r"(?<=\b[A-Za-z])\.|(?<=[A-Za-z])\.(?= )")


def folded(text: str) -> str:
    """Return a text without what words may differ in: case, articles, closing marks and spaces,
    and the full stops of `U.S.` and `Dr. No`.

    Up to three letters behind a number keep their case, since mW is not MW. Where signs of formulas
    stand in the text, only spaces are left out.
    """
    if _FORMULA_SIGN.search(text):
        return re.sub(r"(?<!\w) | (?!\w)", "", text)
    text = _FULL_STOP.sub("", _ARTICLE.sub("", text)).strip(" .!,")
    text = " ".join(re.sub(r" ?([^\w ]) ?", r"\1", text).split())
    return _NO_SYMBOL.sub(lambda found: found[0].casefold(), text)


def why_not(a: Reading, b: Reading, answer: str, solution: str) -> str:
    """Return in one clause why an answer is not the solution."""
    ours, theirs = shown(answer), shown(solution)
    if isinstance(a, Several) or isinstance(b, Several):
        count, wanted = (
            len(reading.items) if isinstance(reading, Several) else 1 for reading in (a, b)
        )
        if count != wanted:
            return f"{_answers(count)} where the solution has {_answers(wanted)}"
    if isinstance(a, Words) and not isinstance(b, Words):
        return f"“{ours}” was not understood as a whole, and is not the solution's text"
    if isinstance(b, Words) and not isinstance(a, Words):
        return f"“{ours}” is not the solution's text “{theirs}”"
    return f"{ours} is not {theirs}"


def _answers(count: int) -> str:
    return "one answer" if count == 1 else f"{count} answers"


def shown(text: str) -> str:
    """Return a text that can be printed, cut to 60 characters."""
    printable = "".join(char if char.isprintable() else "�" for char in text)
    return printable if len(printable) <= SHOWN_CHARS else printable[: SHOWN_CHARS - 1] + "…"
