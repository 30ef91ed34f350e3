"""Computing a formula while reading it from left to right, all of it or nothing.

    sum     = product (("+" | "-") product)*
    product = signed (("*" | "/" | nothing) signed)*
    signed  = ("+" | "-")? power
    power   = atom "!"* ("^" exponent)?
    atom    = number | mixed number | π | letter | group | root | fraction | function

Letters get numbers that nobody would guess.
"""

import math
import re
import zlib
from collections.abc import Callable
from fractions import Fraction

from .numbers import PI, Number, Undefined, Unreadable, integer, written

MAX_DEPTH = 40
"""How deep brackets may nest."""
MAX_SLOW_STEPS = 12
"""How many powers that are not whole, higher roots and functions a formula may have."""
POINTS = range(5)
"""The points, each of which gives every letter a number."""

_TOKEN = re.compile(
    r" *(?:"
    r"(?P<number>(?:[0-9]+(?:\.[0-9]+)?|\.[0-9]+)(?:[eE][+-]?[0-9]{1,4}(?![\w.]))?)"
    r"|(?P<command>\\[A-Za-z]+)"
    r"|(?P<name>[A-Za-zα-ωΑ-Ω]_(?:[0-9A-Za-z]|\{ ?[0-9A-Za-z]{1,8} ?\})'*)"
    r"|(?P<degree>° ?[CF](?![A-Za-z])|kΩ)"
    r"|(?P<word>[A-Za-z]+|[α-ωΑ-Ω]|[\u4e00-\u9fff]+)"
    r"|(?P<sign>\*\*|[-+*/^(){}\[\]!°%√∛π×.€£¥₹'])"
    r")"
)
FUNCTIONS: dict[str, Callable[[float], float]] = {
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

SCALES = {"thousand": 10**3, "million": 10**6, "billion": 10**9, "trillion": 10**12}
"""Words that multiply the number before them."""


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


def evaluate(tokens: list[str], point: int) -> Number | None:
    """Return a formula's value where the letters have the numbers of a point, or None without one.

    Raises Unreadable unless all of the tokens are one formula.
    """
    try:
        return _Reader(tokens, point).read()
    except Undefined:
        return None


def is_letters(token: str) -> bool:
    """Return whether a token stands for letters of algebra."""
    return token[0].isalpha() and token not in ("π", *FUNCTIONS, *SCALES, "sqrt", "cbrt")


class _Reader:
    """Reads the tokens of one formula from left to right, and computes at one point."""

    def __init__(self, tokens: list[str], point: int) -> None:
        self.tokens, self.place, self.point = tokens, 0, point
        self.depth, self.in_function, self.slow_steps = 0, 0, 0

    def read(self) -> Number:
        value = self.sum()
        if self.place < len(self.tokens):
            raise Unreadable
        return value

    def next(self, ahead: int = 0) -> str:
        """Return a token that was not read yet; the empty text after the last one."""
        place = self.place + ahead
        return self.tokens[place] if place < len(self.tokens) else ""

    def refuse_two_letters(self) -> None:
        """Refuse `a^bc` and `√ab`, where the second letter may be meant outside."""
        if len(self.next()) == 2 and self.next().isalpha():
            raise Unreadable

    def count_slow_step(self) -> None:
        self.slow_steps += 1
        if self.slow_steps > MAX_SLOW_STEPS:
            raise Unreadable

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
        sign = self.next()
        if sign in ("+", "-"):
            self.place += 1
        value = self.power()
        return -value if sign == "-" else value

    def power(self) -> Number:
        base = self.atom()
        while self.next() == "!":
            self.place += 1
            base = base.factorial()
        if self.next() == "^":
            self.place += 1
            exponent = self.exponent()
            if exponent.value != int(exponent.value):
                self.count_slow_step()
            base = base**exponent
        if self.next() == "°" and self.in_function:
            self.place += 1
            base = base * PI / integer(180)
        return base

    def exponent(self) -> Number:
        self.refuse_two_letters()
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
        if name in FUNCTIONS:
            return self.function(FUNCTIONS[name])
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
        if self.next() in SCALES:
            value = value * integer(SCALES[self.next()])
            self.place += 1
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
        self.refuse_two_letters()
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise Unreadable
        if degree > 2:
            self.count_slow_step()
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
        self.count_slow_step()
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
        return self.next().removeprefix("\\") in FUNCTIONS

    def letters(self, name: str) -> Number:
        """Read one letter, with its subscript, or two, which are their product or a segment."""
        if "_" in name:
            names = [name.replace("{", "").replace("}", "")]
        elif len(name) <= 2:
            names = [name] if name.isupper() else list(name)
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
