"""Formulas: a number or an expression with letters, with the unit that follows it.

Two formulas with letters are the same where their values at several points are.
"""

import copy
import re
from fractions import Fraction
from functools import cached_property

from .evaluation import FUNCTIONS, POINTS, evaluate, is_letters, is_number, tokens_of
from .numbers import Number, Unreadable, decimal, integer, same_number
from .units import PERCENT, UNITS, Dimensions, read_units, unit_name

_CURRENCIES = {"dollar", "€", "£", "¥", "₹"}
_SIGNS_OF_UNITS = {"°", "%", "°C", "°F"}
_UNIT_OR_LETTER = re.compile(r"[0-9)}π][shglALNJWVK]$")
"""`4s` may mean four seconds, or four times s."""


class Formula:
    """A formula that was read as a whole, with the unit that follows it, if any."""

    def __init__(self, text: str, is_side: bool = False) -> None:
        """Read a normalised text; raises Unreadable unless all of it is one formula.

        `xy` alone is a word, but a formula as a side of an equation.
        """
        tokens = tokens_of(text)
        is_word = len(tokens) == 1 and len(tokens[0]) > 1 and tokens[0].isalpha()
        if not tokens or (is_word and not is_side):
            raise Unreadable
        sign, rest = (tokens[:1], tokens[1:]) if tokens[0] == "-" else ([], tokens)
        if rest[:1] and rest[0] in _CURRENCIES:
            tokens = [*sign, *rest[1:], rest[0]]  # -$5
        self.tokens, self.dimensions, self.size = _one_quantity(tokens) or _unit_at_end(tokens)
        self.may_leave_unit_out = not _UNIT_OR_LETTER.search(text.rstrip())
        self.has_letters = any(is_letters(token) for token in self.tokens)
        if not any(self.values):
            raise Unreadable  # it has no value anywhere

    @cached_property
    def values(self) -> list[Number | None]:
        """The values at all points, without the unit; None where there is none."""
        if not self.has_letters:
            return [evaluate(self.tokens, 0)] * len(POINTS)
        return [evaluate(self.tokens, point) for point in POINTS]

    def same(self, other: "Formula") -> bool:
        """Return whether both formulas have the same value, with their units."""
        scale, other_scale = self._scales(other)
        if scale is None:
            return _percent_left_out(self, other)
        pairs = zip(self.values, other.values, strict=True)
        both = [(a * scale, b * other_scale) for a, b in pairs if a and b]
        is_same = len(both) >= 2 and all(same_number(a, b) for a, b in both)
        return is_same or _percent_left_out(self, other)

    def with_unit_of(self, other: "Formula") -> "Formula":
        """Return this formula with the unit of another."""
        united = copy.copy(self)
        united.dimensions, united.size = other.dimensions, other.size
        united.may_leave_unit_out = other.may_leave_unit_out
        return united

    def close_to(self, other: "Formula") -> bool:
        """Return whether two numbers of one unit, or without, are within one per cent."""
        if self.dimensions and other.dimensions and self.dimensions != other.dimensions:
            return False
        a, b = decimal(self.values[0]), decimal(other.values[0])
        is_one_unit = not (self.dimensions and other.dimensions) or self.size == other.size
        return is_one_unit and abs(a - b) * 100 <= abs(a)

    def _scales(self, other: "Formula") -> tuple[Number | None, Number | None]:
        """Return the factors that make the values of both comparable; None if nothing does."""
        one = integer(1)
        if self.dimensions is None and other.dimensions is None:
            return one, one
        if self.dimensions == other.dimensions:
            return self.size, other.size
        if self.dimensions is not None and other.dimensions is not None:
            return None, None
        if PERCENT in (self.dimensions, other.dimensions):
            return self.size, other.size  # 50% is 0.5
        may_be_left_out = self.may_leave_unit_out and other.may_leave_unit_out
        return (one, one) if may_be_left_out else (None, None)


def _percent_left_out(a: Formula, b: Formula) -> bool:
    """Return whether one says percent, and the other the same number above 1 without a sign."""
    if a.dimensions is None:
        a, b = b, a
    if a.dimensions != PERCENT or b.dimensions is not None or a.has_letters or b.has_letters:
        return False
    x, y = a.values[0], b.values[0]
    return bool(x and y) and abs(x.value) > 1 and same_number(x, y)


def proportional(a: list[Formula], b: list[Formula], negative: bool = True) -> bool:
    """Return whether the values of a are those of b times one factor, at all points.

    Both lists are ordered. A negative factor counts only if it is allowed.
    """
    if len(a) != len(b):
        return False
    factors = []
    for point in POINTS:
        values = [(x.values[point], y.values[point]) for x, y in zip(a, b, strict=True)]
        if not all(x and y for x, y in values):
            continue
        if any(bool(x.value) != bool(y.value) for x, y in values):
            return False
        factors += [x / y for x, y in values if y.value]
    if len(factors) < 2:
        return False
    if not negative and factors[0].value < 0:
        return False
    return all(same_number(factors[0], factor) for factor in factors[1:])


def difference(left: str, right: str) -> Formula:
    """Return the formula of the left side minus the right side."""
    Formula(left, is_side=True), Formula(right, is_side=True)  # 1)+(2 is none
    return Formula(f"({left})-({right})")


def _one_quantity(tokens: list[str]) -> tuple[list[str], Dimensions, Number] | None:
    """Read tokens such as `1 h 30 min` or `35 ° 20 '` as one number of the last unit.

    Each unit is a whole number of the next one. Returns None for anything else.
    """
    numbers, names = tokens[::2], tokens[1::2]
    if names[:1] == ["°"]:
        names = ["arcmin" if name == "'" else name for name in names]
    units = [UNITS.get(unit_name(name) or "") for name in names]
    if len(units) < 2 or len(numbers) != len(units) or not all(units):
        return None
    if not all(map(str.isdecimal, numbers[:-1])) or not is_number(numbers[-1]):
        return None
    total = numbers[:1]
    for number, (measure, size), (next_measure, next_size) in zip(
        numbers[1:], units[:-1], units[1:], strict=True
    ):
        times = Fraction((size / next_size).value)
        if measure != next_measure or times.denominator != 1 or times == 1:
            return None
        total = ["(", *total, ")", "*", str(times), "+", number]
    return total, *units[-1]


def _unit_at_end(tokens: list[str]) -> tuple[list[str], Dimensions | None, Number]:
    """Split the tokens into the formula and what its unit measures, with the unit's size.

    The unit counts for the whole formula, so a formula with other units inside is not understood.
    """
    for place in range(1, len(tokens)):
        token = tokens[place]
        is_unit = unit_name(token) or token.casefold() in ("square", "sq", "cubic", "cu")
        if not is_unit or not _ends_operand(tokens[place - 1]):
            continue
        rest = tokens[:place]
        if token == "°" and any(part.removeprefix("\\") in FUNCTIONS for part in rest):
            continue  # sin 30°
        unit = read_units(tokens[place:])
        if not unit:
            continue
        if any(map(_is_clear_unit, rest)):
            raise Unreadable
        is_letter = token.isascii() and len(token) == 1 and token.isalpha()
        if is_letter and (_is_sum(rest) or any(map(is_letters, rest))):
            continue  # a letter of algebra: 3x + 2h, πr²h
        if _is_sum(rest):
            raise Unreadable
        return rest, *unit
    return tokens, None, integer(1)


def _ends_operand(token: str) -> bool:
    return token in (")", "}", "π") or token[0].isalnum() or token[0] == "."


def _is_clear_unit(token: str) -> bool:
    """Return whether a token can only be a unit, not a letter of algebra."""
    return token in _SIGNS_OF_UNITS or (len(token) > 1 and unit_name(token) is not None)


def _is_sum(tokens: list[str]) -> bool:
    """Return whether the tokens are a sum without brackets, to whose last term a unit belongs."""
    depth = 0
    for place, token in enumerate(tokens):
        depth += (token in "([{") - (token in ")]}")
        if depth == 0 and place and token in "+-" and _ends_operand(tokens[place - 1]):
            return True
    return False
