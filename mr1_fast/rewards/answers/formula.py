"""Formulas: a reader that understands a whole text or nothing, and computes its value.

    sum     = product (("+" | "-") product)*
    product = signed (("*" | "/" | nothing) signed)*
    signed  = ("+" | "-")* power
    power   = atom "!"* ("^" exponent)?
    atom    = number | mixed number | π | letter | group | root | fraction | function

It computes while it reads. Letters get numbers that nobody would guess, so two formulas in letters
are the same where their values at several such points are.
"""

import math
import re
import zlib
from collections.abc import Callable
from fractions import Fraction

from .numbers import PI, Number, Undefined, Unreadable, integer, same_number, written
from .units import PERCENT, Dimensions, read_units, unit_name

MAX_DEPTH = 40
"""How deep brackets may nest."""
POINTS = range(5)
"""The points at which formulas with letters are compared."""

_TOKEN = re.compile(
    r" *(?:"
    r"(?P<number>(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,4}(?![\w.]))?)"
    r"|(?P<command>\\[A-Za-z]+)"
    r"|(?P<name>[A-Za-zα-ωΑ-Ω]_(?:[0-9A-Za-z]|\{ ?[0-9A-Za-z]{1,8} ?\})'*)"
    r"|(?P<degree>° ?[CF](?![A-Za-z]))"
    r"|(?P<word>[A-Za-z]+|[α-ωΑ-Ω]|[\u4e00-\u9fff]+)"
    r"|(?P<sign>\*\*|[-+*/^(){}\[\]!°%√∛π×.€£¥'])"
    r")"
)
_FUNCTIONS: dict[str, Callable[[float], float]] = {
    "sin": math.sin,
    "cos": math.cos,
    "tan": math.tan,
    "cot": lambda x: 1 / math.tan(x),
    "sec": lambda x: 1 / math.cos(x),
    "csc": lambda x: 1 / math.sin(x),
    "arcsin": math.asin,
    "arccos": math.acos,
    "arctan": math.atan,
    "ln": math.log,
    "log": math.log10,
    "lg": math.log10,
    "exp": math.exp,
}
_CURRENCIES = {"dollar", "€", "£", "¥"}
_SIGNS_OF_UNITS = {"°", "%", "°C", "°F"}


def tokens_of(text: str) -> list[str]:
    """Split a text into tokens; raises Unreadable at a character that belongs to no formula."""
    tokens, place, text = [], 0, text.rstrip()
    while place < len(text):
        found = _TOKEN.match(text, place)
        if not found:
            raise Unreadable
        token = found[0].lstrip()
        if found["degree"] or found["name"]:
            token = token.replace(" ", "")
        tokens.append({"**": "^", "×": "*"}.get(token, token))
        place = found.end()
    return tokens


class Formula:
    """A formula that was read as a whole, with the unit that follows it, if any."""

    def __init__(self, text: str) -> None:
        """Read a normalised text; raises Unreadable unless all of it is one formula."""
        tokens = tokens_of(text)
        if not tokens or len(tokens) == 1 and len(tokens[0]) > 1 and tokens[0].isalpha():
            raise Unreadable  # one word
        if tokens[0] in _CURRENCIES:
            tokens = [*tokens[1:], tokens[0]]
        self.tokens, self.dimensions, self.size = _unit_at_end(tokens)
        self.has_letters = any(_is_letters(token) for token in self.tokens)
        if not any(self.values()):
            raise Unreadable  # it has no value anywhere

    def value_at(self, point: int) -> Number | None:
        """Return the value where the letters have the numbers of this point, or None without one.

        The unit does not count.
        """
        try:
            return _Reader(self.tokens, point).read()
        except Undefined:
            return None

    def values(self, all_points: bool = False) -> list[Number | None]:
        """Return the values at all points, or one value if the formula has no letters."""
        points = POINTS if self.has_letters or all_points else POINTS[:1]
        return [self.value_at(point) for point in points]

    def same(self, other: "Formula") -> bool:
        """Return whether both formulas have the same value, with their units."""
        scale, other_scale = self._scales(other)
        if scale is None:
            return _percent_left_out(self, other)
        letters = self.has_letters or other.has_letters
        pairs = zip(self.values(letters), other.values(letters), strict=True)
        both = [(a * scale, b * other_scale) for a, b in pairs if a and b]
        is_same = len(both) > letters and all(same_number(a, b) for a, b in both)
        return is_same or _percent_left_out(self, other)

    def _scales(self, other: "Formula") -> tuple[Number | None, Number | None]:
        """Return the factors that make the values of both comparable; None if nothing does."""
        one = integer(1)
        if self.dimensions == other.dimensions and self.dimensions is not None:
            return self.size, other.size
        if PERCENT in (self.dimensions, other.dimensions):
            if None not in (self.dimensions, other.dimensions):
                return None, None
            return self.size, other.size
        if self.dimensions is not None and other.dimensions is not None:
            return None, None
        return one, one


def _percent_left_out(a: Formula, b: Formula) -> bool:
    """Return whether one says percent, and the other the same number above 1 without a sign."""
    if a.dimensions is None:
        a, b = b, a
    if a.dimensions != PERCENT or b.dimensions is not None or a.has_letters or b.has_letters:
        return False
    x, y = a.value_at(0), b.value_at(0)
    return bool(x and y) and abs(x.value) > 1 and same_number(x, y)


def proportional(a: list[Formula], b: list[Formula], negative: bool = True) -> bool:
    """Return whether the values of a are those of b times one factor, at all points.

    Both lists are ordered. A negative factor counts only if it is allowed.
    """
    if len(a) != len(b):
        return False
    letters = any(formula.has_letters for formula in a + b)
    factors = []
    for point in POINTS if letters else POINTS[:1]:
        values = [(x.value_at(point), y.value_at(point)) for x, y in zip(a, b, strict=True)]
        if not all(x and y for x, y in values):
            continue
        if any(bool(x.value) != bool(y.value) for x, y in values):
            return False
        factors += [x / y for x, y in values if y.value]
    if len(factors) <= letters:
        return False
    if not negative and factors[0].value < 0:
        return False
    return all(same_number(factors[0], factor) for factor in factors[1:])


def difference(left: str, right: str) -> Formula:
    """Return the formula of the left side minus the right side."""
    Formula(left), Formula(right)  # each side is a formula of its own
    return Formula(f"({left})-({right})")


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
        if token == "°" and any(part.removeprefix("\\") in _FUNCTIONS for part in rest):
            continue  # sin 30°
        unit = read_units(tokens[place:])
        if unit:
            if _is_sum(rest) or any(_is_clear_unit(token) for token in rest):
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


class _Reader:
    """Reads the tokens of one formula from left to right, and computes at one point."""

    def __init__(self, tokens: list[str], point: int) -> None:
        self.tokens, self.place, self.point = tokens, 0, point
        self.depth, self.in_function = 0, 0

    def read(self) -> Number:
        value = self.sum()
        if self.place < len(self.tokens):
            raise Unreadable
        return value

    def next(self, ahead: int = 0) -> str:
        """Return a token that was not read yet; the empty text after the last one."""
        place = self.place + ahead
        return self.tokens[place] if place < len(self.tokens) else ""

    def take(self, token: str) -> None:
        if self.next() != token:
            raise Unreadable
        self.place += 1

    def sum(self) -> Number:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable
        total = self.product()
        while self.next() in ("+", "-"):
            sign = self.next()
            self.place += 1
            term = self.product()
            total = total + (term if sign == "+" else -term)
        self.depth -= 1
        return total

    def product(self) -> Number:
        total = self.signed()
        while True:
            if self.next() in ("*", "/"):
                sign = self.next()
                self.place += 1
                factor = self.signed()
                total = total * factor if sign == "*" else total / factor
            elif self.starts_factor():
                total = total * self.power()
            else:
                return total

    def starts_factor(self) -> bool:
        """Return whether the next token may follow a factor without a sign between: never a number,
        nor a number in brackets, since `2(3)` may not mean 6."""
        token = self.next()
        if token == "(":
            return not (is_number(self.next(1)) and self.next(2) == ")")
        return token in ("√", "∛", "π") or token[:1] == "\\" or token[:1].isalpha()

    def signed(self) -> Number:
        is_negative = False
        while self.next() in ("+", "-"):
            is_negative ^= self.next() == "-"
            self.place += 1
        value = self.power()
        return -value if is_negative else value

    def power(self) -> Number:
        base = self.atom()
        while self.next() == "!":
            self.place += 1
            base = base.factorial()
        if self.next() == "^":
            self.place += 1
            base = base ** self.exponent()
        if self.next() == "°" and self.in_function:
            self.place += 1
            base = base * PI / integer(180)
        return base

    def exponent(self) -> Number:
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable
        value = self.signed()
        self.depth -= 1
        return value

    def atom(self) -> Number:
        token = self.next()
        if not token:
            raise Unreadable
        self.place += 1
        if is_number(token):
            return self.number(token)
        if token == "π":
            return PI
        if token in ("(", "{", "["):
            return self.group({"(": ")", "{": "}", "[": "]"}[token])
        if token in ("√", "∛", "\\sqrt", "sqrt", "cbrt"):
            return self.root(3 if token in ("∛", "cbrt") else 2, token == "\\sqrt")
        if token == "\\frac":
            top = self.argument()
            return top / self.argument()
        name = token.removeprefix("\\")
        if name in _FUNCTIONS:
            return self.function(_FUNCTIONS[name])
        if token == name and (name[0].isalpha() and name[0] < "\u4e00"):
            return self.letters(name)
        raise Unreadable

    def number(self, token: str) -> Number:
        """Read a number; a whole one before a proper fraction makes a mixed number, as 1 1/2 is."""
        value = written(token)
        a, slash, b = self.next(), self.next(1), self.next(2)
        if token.isdecimal() and a.isdecimal() and slash == "/" and b.isdecimal():
            if int(a) >= int(b) or self.next(3) in ("^", "!", "/"):
                raise Unreadable
            self.place += 3
            return value + integer(int(a)) / integer(int(b))
        shape = self.tokens[self.place : self.place + 7]
        if token.isdecimal() and "".join(shape[:2] + shape[3:5] + shape[6:]) == "\\frac{}{}":
            a, b = shape[2], shape[5]
            if a.isdecimal() and b.isdecimal() and int(a) < int(b):
                self.place += 7
                return value + integer(int(a)) / integer(int(b))
        if is_number(self.next()):
            raise Unreadable
        return value

    def group(self, closing: str) -> Number:
        value = self.sum()
        self.take(closing)
        return value

    def root(self, degree: int, may_have_degree: bool) -> Number:
        if may_have_degree and self.next() == "[":
            if not (self.next(1).isdecimal() and self.next(2) == "]"):
                raise Unreadable
            degree = int(self.next(1)[:4])
            self.place += 3
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable
        value = self.atom().root(degree)
        self.depth -= 1
        return value

    def argument(self) -> Number:
        r"""Read what `\frac` takes: a group in braces, or one digit or letter."""
        if self.next() == "{":
            self.place += 1
            return self.group("}")
        if len(self.next()) != 1:
            raise Unreadable
        return self.atom()

    def function(self, function: Callable[[float], float]) -> Number:
        exponent = integer(1)
        if self.next() == "^":
            self.place += 1
            exponent = self.exponent()
            if exponent.value == -1:
                raise Unreadable  # sin^{-1} may mean the inverse
        self.in_function += 1
        if self.next() in ("(", "{"):
            value = self.atom()
            if self.next() == "°":
                self.place += 1
                value = value * PI / integer(180)
        else:
            value = self.power()
            while self.starts_factor() and self.next() != "(" and not self.starts_function():
                value = value * self.power()
        self.in_function -= 1
        return value.apply(function) ** exponent

    def starts_function(self) -> bool:
        return self.next().removeprefix("\\") in _FUNCTIONS

    def letters(self, name: str) -> Number:
        """Read one letter, with its subscript, or two letters, which are their product."""
        if "_" in name:
            names = [name.replace("{", "").replace("}", "")]
        elif len(name) <= 2:
            names = list(name)
        else:
            raise Unreadable  # a word
        while self.next() == "'":
            names[-1] += "'"
            self.place += 1
        if is_number(self.next()):
            raise Unreadable  # x2 may be x² or a name
        value = integer(1)
        for letter in names:
            value = value * _number_for(letter, self.point)
        return value


def _is_letters(token: str) -> bool:
    """Return whether a token stands for letters of algebra."""
    return token[0].isalpha() and token != "π" and token not in (*_FUNCTIONS, "sqrt", "cbrt")


def is_number(token: str) -> bool:
    """Return whether a token is a number."""
    return token[:1].isdecimal() or (token[:1] == "." and len(token) > 1)


def _number_for(letter: str, point: int) -> Number:
    """Return the number that a letter stands for at a point; negative ones at the last two."""
    top = zlib.crc32(f"{letter} {point} top".encode()) % 900 + 100
    bottom = (101, 307, 499, 53, 211)[point]
    if point >= 3 and zlib.crc32(f"{letter} {point} sign".encode()) % 2:
        top = -top
    return Number(Fraction(top, bottom))
