"""What an answer can be: the kinds of things that are read and compared."""

from dataclasses import dataclass
from datetime import date

from .formula import Formula


@dataclass(frozen=True)
class Words:
    """A text that only the same text equals."""

    text: str


@dataclass(frozen=True)
class Infinity:
    """Positive or negative infinity."""

    sign: str


@dataclass(frozen=True)
class Choice:
    """The letter of an option, with the option's text if that was written too."""

    letter: str
    rest: "Reading | None"


@dataclass(frozen=True)
class Relation:
    """An equation or inequality `difference sign 0`, with the sign =, ≠, > or ≥."""

    sign: str
    difference: Formula


@dataclass(frozen=True)
class Named:
    """`x = 5`: a name and what it is."""

    name: str
    value: "Reading"
    relation: Relation | None = None
    """The same as an equation of two formulas, if it is one."""


@dataclass(frozen=True)
class Several:
    """Several answers: a list in brackets, or without brackets."""

    items: tuple["Reading", ...]
    opening: str = ""
    closing: str = ""

    @property
    def is_ordered(self) -> bool:
        """Whether the items' order counts: in round and square brackets, and in x = 3, y = 4."""
        names = {item.name for item in self.items if isinstance(item, Named)}
        return self.opening in ("(", "[") or len(names) > 1


@dataclass(frozen=True)
class Clock:
    """A time of day or a duration such as 10:45."""

    hours: int
    minutes: int
    seconds: int


@dataclass(frozen=True)
class Ratio:
    """A ratio such as 1:3, or dimensions such as 3×4."""

    sign: str
    parts: tuple[Formula, ...]


Reading = Words | Infinity | Choice | Named | Relation | Several | Clock | Ratio | date | Formula
"""What the readers make of a text."""
