"""The judge itself: normalise both texts, read each as a whole, and compare what was read."""

from datetime import date

from .compare import same, why_not
from .formula import Formula
from .kinds import Choice, Clock, Infinity, Named, Ratio, Reading, Relation, Several, Words
from .notation import normalise
from .numbers import Unreadable
from .reading import read
from .verdict import Verdict

MAX_CHARS = 1000
"""The longest answer or solution that is read, in characters."""


def judge(answer: str, solution: str) -> Verdict:
    """Return whether the text of an answer says what the solution says, with the reason.

    Both texts are brought to one way of writing and read as a whole: as a number with or without a
    unit, a formula, an equation, several answers, a choice, a date, a clock time, a ratio or words.
    Two things of one kind are compared by their meaning; see docs/judge.md for the rules and
    same_number for the tolerances. A text that no reader understands as a whole equals only the
    same text.

    Any strings may be given. A text of more than 1,000 characters is not read: it is wrong.

    >>> judge("12 cm", "0.12 m").right
    True
    >>> judge("5√2", "5√3")
    Verdict(right=False, why='5√2 is not 5√3')
    """
    for text, name in ((answer, "answer"), (solution, "solution")):
        if len(text) > MAX_CHARS:
            return Verdict(False, f"the {name} is longer than {MAX_CHARS:,} characters")
    ours, theirs = normalise(answer), normalise(solution)
    if not ours or not theirs:
        return Verdict(False, f"the {'solution' if ours else 'answer'} is empty")
    if ours == theirs:
        return Verdict(True, "the same text")
    a, b = read(ours), read(theirs)
    try:
        is_same = same(a, b)
    except Unreadable:  # the numbers are too large to compare
        is_same = False
    if is_same:
        return Verdict(True, f"the same {_kind(b)}")
    return Verdict(False, why_not(a, b, ours, theirs))


def kind_of(solution: str) -> str:
    """Return what the judge reads in a solution, in one or two words.

    This is "empty" or "too long" for a solution with which no answer can be right, and "text" for
    one that only the same words equal.

    >>> [kind_of(text) for text in ("145°", "B", "3 or 4", "(3, 4)", "red", "")]
    ['number', 'choice', 'set of answers', 'tuple', 'text', 'empty']
    """
    if len(solution) > MAX_CHARS:
        return "too long"
    normal = normalise(solution)
    return _kind(read(normal)) if normal else "empty"


def _kind(reading: Reading) -> str:
    if isinstance(reading, Named):
        return _kind(reading.value)
    if isinstance(reading, Formula):
        return "expression" if reading.has_letters else "number"
    if isinstance(reading, Several):
        return "tuple" if reading.is_ordered else "set of answers"
    if isinstance(reading, Relation):
        return "equation" if reading.sign == "=" else "inequality"
    if isinstance(reading, Ratio):
        return "ratio" if reading.sign == ":" else "size"
    names = {Words: "text", Infinity: "number", Choice: "choice", Clock: "time", date: "date"}
    return names[type(reading)]
