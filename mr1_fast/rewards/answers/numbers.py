"""Numbers of bounded size: exact fractions, and 60 digits where a root or π has no fraction.

Nothing here takes long, whatever the numbers are: a result that would need more than 4,000 bits is
refused instead of computed.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from decimal import Context, Decimal, DivisionByZero, InvalidOperation, Overflow, Underflow
from fractions import Fraction

MAX_BITS = 4000
"""The largest numerator or denominator, in bits, and so the largest magnitude."""
MAX_FACTORIAL = 100
"""The largest number whose factorial is computed."""
NOISE = Decimal("1e-12")
"""Relative difference between two written decimals that is the noise of floating-point arithmetic,
as in 2.9999999999999996."""
ROUNDED = Decimal("1e-6")
"""Relative difference at which a written decimal stands for a fraction, a root or π."""
FUNCTION = Decimal("1e-9")
"""Relative difference between values of sin, log and others, computed in double precision."""
EXACT = Decimal("1e-30")
"""Relative difference between two equal roots or multiples of π, computed to 60 digits."""

_DIGITS = Context(
    prec=60, Emax=9999, Emin=-9999, traps=[InvalidOperation, DivisionByZero, Overflow, Underflow]
)
_CANCELLED = Decimal("1e-40")


class Unreadable(Exception):
    """The text is no formula, or its numbers are too large to compute."""


class Undefined(Unreadable):
    """The formula has no value here: a division by zero, or the root of a negative number."""


@dataclass(frozen=True)
class Number:
    """A number: a Fraction where it is known exactly, otherwise a Decimal of 60 digits."""

    value: Fraction | Decimal
    is_rounded: bool = False
    """Whether a decimal with digits after the point went into it, which may be a rounded number."""
    is_rough: bool = False
    """Whether a function such as sin went into it, which is computed in double precision."""

    def __add__(self, other: "Number") -> "Number":
        if _both_exact(self, other):
            return _joined(self.value + other.value, self, other)
        a, b = decimal(self), decimal(other)
        total = _DIGITS.add(a, b)
        if abs(total) < _CANCELLED * max(abs(a), abs(b)):
            return _joined(Fraction(0), self, other)
        return _joined(total, self, other)

    def __mul__(self, other: "Number") -> "Number":
        if _both_exact(self, other):
            return _joined(self.value * other.value, self, other)
        if not self.value or not other.value:
            return _joined(Fraction(0), self, other)
        return _joined(_DIGITS.multiply(decimal(self), decimal(other)), self, other)

    def __truediv__(self, other: "Number") -> "Number":
        if not other.value:
            raise Undefined
        if _both_exact(self, other):
            return _joined(self.value / other.value, self, other)
        return _joined(_DIGITS.divide(decimal(self), decimal(other)), self, other)

    def __neg__(self) -> "Number":
        return Number(-self.value, self.is_rounded, self.is_rough)

    def __pow__(self, other: "Number") -> "Number":
        exponent = other.value
        if not self.value:
            if exponent <= 0:
                raise Undefined
            return _joined(Fraction(0), self, other)
        if isinstance(exponent, Fraction) and exponent.denominator == 1:
            return _joined(_integer_power(self.value, int(exponent)), self, other)
        if self.value < 0:
            raise Undefined
        return _joined(_computed(_DIGITS.power, decimal(self), decimal(other)), self, other)

    def root(self, degree: int) -> "Number":
        """Return the root of this degree, exactly where it is a fraction."""
        if not 2 <= degree <= 100 or (self.value < 0 and degree % 2 == 0):
            raise Undefined
        if self.value < 0:
            return -((-self).root(degree))
        if not self.value:
            return self
        if isinstance(self.value, Fraction):
            top = _integer_root(self.value.numerator, degree)
            bottom = _integer_root(self.value.denominator, degree)
            if top and bottom:
                return Number(Fraction(top, bottom), self.is_rounded, self.is_rough)
        if degree == 2:
            value = _DIGITS.sqrt(decimal(self))
        else:
            power = _DIGITS.divide(Decimal(1), Decimal(degree))
            value = _computed(_DIGITS.power, decimal(self), power)
        return Number(value, self.is_rounded, self.is_rough)

    def factorial(self) -> "Number":
        """Return the factorial of a whole number of at most 100."""
        if not isinstance(self.value, Fraction) or self.value.denominator != 1:
            raise Undefined
        if not 0 <= self.value <= MAX_FACTORIAL:
            raise Unreadable
        return Number(Fraction(math.factorial(int(self.value))), self.is_rounded, self.is_rough)

    def apply(self, function: Callable[[float], float]) -> "Number":
        """Return a function's value in double precision."""
        try:
            value = function(float(self.value))
        except (ValueError, OverflowError, ZeroDivisionError) as error:
            raise Undefined from error
        if not math.isfinite(value):
            raise Undefined
        # What is 0 in exact arithmetic, such as cos 90°, comes out as 6e-17.
        value = 0.0 if abs(value) < 1e-15 else value
        return Number(Decimal(value) if value else Fraction(0), self.is_rounded, is_rough=True)


def integer(value: int) -> Number:
    """Return a whole number."""
    return Number(Fraction(value))


PI = Number(Decimal("3.14159265358979323846264338327950288419716939937510582097494"))


def written(text: str) -> Number:
    """Return the number that is written as digits, with a point or an exponent, such as 1.5e3."""
    digits, _, exponent = text.lower().partition("e")
    value = Fraction(digits)
    if exponent:
        value *= _integer_power(Fraction(10), int(exponent))
    return Number(_bounded(value), is_rounded=value.denominator != 1)


def same_number(a: Number, b: Number) -> bool:
    """Return whether two numbers are the same.

    Whole numbers and fractions must be exactly the same, and roots and multiples of π to 30 digits,
    or to 1e-9 relative where sin, log and such went in. A written decimal may differ by 1e-12
    relative from another decimal or whole number, and by 1e-6 from a fraction, a root or a multiple
    of π.
    """
    if a.value == b.value and _both_exact(a, b):
        return True
    is_rounded = a.is_rounded or b.is_rounded
    if _both_exact(a, b):
        if not is_rounded:
            return False
        tolerance = NOISE if _terminates(a.value) and _terminates(b.value) else ROUNDED
    elif is_rounded:
        tolerance = ROUNDED
    else:
        tolerance = FUNCTION if a.is_rough or b.is_rough else EXACT
    x, y = decimal(a), decimal(b)
    return abs(_DIGITS.subtract(x, y)) <= _DIGITS.multiply(tolerance, max(abs(x), abs(y)))


def decimal(number: Number) -> Decimal:
    """Return the number to 60 digits."""
    if isinstance(number.value, Decimal):
        return number.value
    top, bottom = number.value.numerator, number.value.denominator
    return _DIGITS.divide(_DIGITS.create_decimal(top), _DIGITS.create_decimal(bottom))


def _both_exact(a: Number, b: Number) -> bool:
    return isinstance(a.value, Fraction) and isinstance(b.value, Fraction)


def _joined(value: Fraction | Decimal, a: Number, b: Number) -> Number:
    """Return the result of an operation on two numbers."""
    return Number(_bounded(value), a.is_rounded or b.is_rounded, a.is_rough or b.is_rough)


def _bounded(value: Fraction | Decimal) -> Fraction | Decimal:
    """Return the value; raises Unreadable if it is too large or too close to 0."""
    if isinstance(value, Fraction):
        size = max(value.numerator.bit_length(), value.denominator.bit_length())
    else:
        size = abs(value.adjusted()) * 4 if value else 0
    if size > MAX_BITS:
        raise Unreadable
    return value


def _integer_power(value: Fraction | Decimal, exponent: int) -> Fraction | Decimal:
    if isinstance(value, Decimal):
        if abs(exponent) > MAX_BITS:
            raise Unreadable
        return _computed(_DIGITS.power, value, Decimal(exponent))
    size = max(abs(value.numerator), value.denominator).bit_length() - 1
    if abs(exponent) * max(size, 1) > MAX_BITS:
        raise Unreadable
    return value**exponent


def _computed(function: Callable[..., Decimal], *values: Decimal) -> Decimal:
    try:
        return function(*values)
    except ArithmeticError as error:
        raise Unreadable from error


def _integer_root(value: int, degree: int) -> int | None:
    """Return the whole root of a positive whole number, or None if it has none."""
    if degree == 2:
        root = math.isqrt(value)
    else:
        root = 1 << -(-value.bit_length() // degree)
        while (step := ((degree - 1) * root + value // root ** (degree - 1)) // degree) < root:
            root = step
    return root if root**degree == value else None


def _terminates(value: Fraction) -> bool:
    """Return whether the fraction can be written as a decimal in full."""
    bottom = value.denominator
    bottom >>= (bottom & -bottom).bit_length() - 1
    return pow(5, bottom.bit_length(), bottom) == 0 if bottom > 1 else True
