"""Reading a whole answer: what kind of thing it is, and what it says.

A text is read by the first reader that understands all of it. What none of them understands is
`Words`, which are the same only as the same words.
"""

import re

from .dates import read_clock, read_date
from .formula import Formula, difference
from .kinds import Choice, Infinity, Named, Ratio, Reading, Relation, Several, Words
from .labels import is_label
from .notation import CLOSING, OPENING, closes_at_end
from .numbers import Unreadable
from .units import PERCENT

MAX_ITEMS = 64
"""The most answers that are read in one text."""
MAX_LEVELS = 6
"""How deep lists may nest."""


def read(text: str, level: int = 0) -> Reading:
    """Read a normalised text."""
    text = _without_preamble(text)
    if level > MAX_LEVELS:
        return Words(text)
    readers = (
        _read_choice,
        read_date,
        read_clock,
        _read_label,
        _read_matrix,
        _read_brackets,
        _read_point,
        _read_list,
        _read_both_signs,
        _read_relation,
        _read_ratio,
        _read_formula,
    )
    for reader in readers:
        try:
            found = reader(text, level)
        except Unreadable:
            return Words(text)
        if found is not None:
            return found
    return Words(text)


_PREAMBLE = re.compile(
    r"(?:(?:so|thus|hence|therefore),? )?(?:the )?(?:(?:final|correct|right) )?"
    r"(?:answer|choice|option|result|solution)(?: is| =|=| ?:)+ ?(?!$)|答案(?:是|为|:)? ?(?!$)",
    re.IGNORECASE,
)
_LEADING_SIGN = re.compile(r"[=≈] ?(?=[^=≈ ])")
_THOUSANDS = re.compile(r"(?<![\d.,])[1-9]\d{0,2}(?:,\d{3})+(?!\d|,\d)")


def _without_preamble(text: str) -> str:
    """Take `The answer is` and a leading `=` away, and commas between thousands.

    Inside brackets a comma separates coordinates, so (1,234) stays a pair.
    """
    text = text.strip()
    if found := _PREAMBLE.match(text):
        text = text[found.end() :].strip()
    if found := _LEADING_SIGN.match(text):
        text = text[found.end() :]
    if any(bracket in text for bracket in OPENING):
        return text
    return _THOUSANDS.sub(lambda found: found[0].replace(",", ""), text)


_LONE_CHOICE = re.compile(
    r"(?:(?:option|choice|选项|选) ?)?(?:\( ?([A-J]) ?\)|\[ ?([A-J]) ?\]|([A-J])(?: ?[).:])?)",
    re.IGNORECASE,
)
_CHOICE = re.compile(
    r"(?:(?:option|choice|选项|选) ?)?"
    r"(?:\( ?([A-J]) ?\)[.:]?|([A-J]) ?(?:[):、]|\.(?![A-Za-z]))) ?([^ =].{0,200})",
    re.IGNORECASE,
)
_OTHER_LETTER = re.compile(r"(?<![A-Za-z0-9'])(?:[A-J]|[b-j])(?![A-Za-z0-9'])")


def _read_choice(text: str, level: int) -> Choice | None:
    if found := _LONE_CHOICE.fullmatch(text):
        return Choice((found[1] or found[2] or found[3]).upper(), None)
    found = _CHOICE.fullmatch(text)
    if not found or level:
        return None
    rest = read(found[3], level + 1)
    if isinstance(rest, Choice):
        return None
    if not _is_plain(rest) and _OTHER_LETTER.search(found[3]):
        return None  # "C. B is wrong" names two
    return Choice((found[1] or found[2]).upper(), rest)


def _is_plain(reading: Reading) -> bool:
    """Return whether an option's text was understood, and holds no letters of its own."""
    if isinstance(reading, Named):
        return len(reading.name) > 1 and _is_plain(reading.value)
    if isinstance(reading, Formula):
        return not reading.has_letters
    return not isinstance(reading, (Words, Several, Relation, Ratio))


def _read_label(text: str, level: int) -> Words | None:
    return Words(text) if is_label(text) else None


_MATRIX = re.compile(r"\\begin ?\{ ?([pb]?matrix) ?\}(.*)\\end ?\{ ?\1 ?\}", re.DOTALL)


def _read_matrix(text: str, level: int) -> Several | None:
    found = _MATRIX.fullmatch(text)
    if not found or "\\begin" in found[2]:
        return None
    lines = found[2].strip().removesuffix("\\\\").split("\\\\")
    rows = [_several(line.split("&"), level, "[", "]") for line in lines]
    if len(rows) > MAX_ITEMS or len({len(row.items) for row in rows}) != 1:
        return None
    return Several(tuple(rows), "[", "]")


def _read_brackets(text: str, level: int) -> Reading | None:
    """Read a tuple, an interval, a list or a set, by the brackets around it."""
    if not closes_at_end(text):
        return None
    items = _split(text[1:-1], _COMMA)
    is_set = text[0] in "{⦃"
    if len(items) > 1:
        return _several(items, level, "{" if is_set else text[0], "}" if is_set else text[-1])
    return read(text[1:-1], level + 1)


_POINT = re.compile(r"(?:(?:the )?point ?)?([A-Z]'?)? ?(\(.+\))")


def _read_point(text: str, level: int) -> Reading | None:
    """Read `A(2, 3)` as the name of a point and its coordinates."""
    found = _POINT.fullmatch(text)
    place = _read_brackets(found[2], level) if found else None
    if not isinstance(place, Several) or place.closing != ")":
        return None
    return Named(found[1], place) if found[1] else place


_COMMA = re.compile(r" ?[,;、] ?")
_SEPARATOR = re.compile(r" ?[,;、] ?(?:(?:and|or) )?| (?:and|or|&) | ?(?:∪|或|和) ?", re.IGNORECASE)


def _read_list(text: str, level: int) -> Several | None:
    items = _split(text, _SEPARATOR)
    return _several(items, level) if len(items) > 1 else None


def _several(items: list[str], level: int, opening: str = "", closing: str = "") -> Several:
    if len(items) > MAX_ITEMS or any(not item.strip() for item in items):
        raise Unreadable
    return Several(tuple(read(item, level + 1) for item in items), opening, closing)


def _split(text: str, separator: re.Pattern) -> list[str]:
    """Split a text where the separator stands outside of all brackets."""
    depths, depth = [], 0
    for char in text:
        depth += char in OPENING
        depths.append(depth)
        depth -= char in CLOSING
    parts, start = [], 0
    for found in separator.finditer(text):
        if depths[found.start()] == 0:
            parts.append(text[start : found.start()])
            start = found.end()
    return [*parts, text[start:]]


def _read_both_signs(text: str, level: int) -> Several | None:
    """Read `3 ± 1` as its two values."""
    if text.count("±") != 1:
        return None
    return _several([text.replace("±", "+"), text.replace("±", "-")], level)


_RELATION = re.compile("[=<>≤≥≠≈∈]")
_NAME = re.compile(
    r"(?i:(?:the )?(?:area|perimeter|length|volume|angle|radius|width|height|distance|speed))|"
    r"m? ?[∠△] ?(?:[A-Z]{1,3}|[a-z0-9])|"
    r"(?:[A-Z]{1,4}|[a-zα-ωΑ-Ω])(?:_(?:\w|\{[\w△∠ ]{1,8}\}))?'{0,2}|"
    r"[A-Za-z] ?\( ?[A-Za-z] ?\)|"
    r"\( ?[A-Za-z] ?(?:, ?[A-Za-z] ?){1,3}\)"
)


def _read_relation(text: str, level: int) -> Reading | None:
    """Read an equation or inequality, or what has a name on one side of `=`."""
    signs = _RELATION.findall(text)
    if not signs:
        return None
    sides = [side.strip() for side in _RELATION.split(text)]
    if set(signs) <= {"=", "≈"}:
        if len(signs) > 1 or signs == ["≈"] or not any(_has_letters(side) for side in sides):
            return _chain(signs, sides) or Words(text)
        for name, value in (sides, sides[::-1]):
            if _is_name(name) and not _is_name(value) and _says_nothing_of(name, value):
                return Named(_name(name), read(value, level + 1), _equation(*sides))
    elif len(signs) > 1 or signs == ["∈"]:
        return _interval(signs, sides, level) or Words(text)
    sign, (left, right) = signs[0], sides
    if sign in "<≤":
        left, right, sign = right, left, {"<": ">", "≤": "≥"}[sign]
    relation = Relation(sign, difference(left, right))
    values = {value.value for value in relation.difference.values if value}
    return relation if len(values) > 1 else Words(text)  # 2 < 3 says nothing that 1 < 2 does not


def _interval(signs: list[str], sides: list[str], level: int) -> Named | None:
    """Read `0 ≤ x < 5` as the interval [0, 5) with the name x, and `x ∈ [0, 5)` as the same."""
    if signs == ["∈"]:
        name, value = sides
        return Named(_name(name), read(value, level + 1)) if _is_name(name) and value else None
    if set(signs) <= {">", "≥"}:
        signs, sides = signs[::-1], sides[::-1]
    elif not set(signs) <= {"<", "≤"}:
        return None
    if len(signs) != 2 or not _is_name(sides[1]):
        return None
    opening, closing = (
        strict if sign in "<>" else loose
        for sign, strict, loose in zip(signs, "()", "[]", strict=True)
    )
    return Named(_name(sides[1]), _several(sides[::2], level, opening, closing))


def _chain(signs: list[str], sides: list[str]) -> Reading | None:
    """Read a calculation such as `AB = 2·3 = 6` or `2√3 ≈ 3.46` as the number it comes to.

    All numbers in it must be the same, and behind ≈ within one per cent: then it gives one answer
    only. The number is the last one before ≈.
    """
    name = ""
    if _is_name(sides[0]):
        name, signs, sides = _name(sides[0]), signs[1:], sides[1:]
    formulas = [Formula(side) for side in sides]
    exact = signs.index("≈") if "≈" in signs else len(signs)
    result = formulas[exact]
    for place, formula in enumerate(formulas):
        if formula.has_letters and (place >= exact or not name):
            return None  # 2x = 3 + 3 = 6 does not say that anything is 6
    for formula in formulas:
        if formula.dimensions not in (None, PERCENT) and result.dimensions is None:
            result = result.with_unit_of(formula)
    for place, formula in enumerate(formulas):
        if formula.has_letters:
            continue
        is_same = result.close_to(formula) if place > exact else result.same(formula)
        if not is_same:
            return None
    return Named(name, result) if name else result


def _has_letters(text: str) -> bool:
    try:
        return Formula(text).has_letters
    except Unreadable:
        return True


def _equation(left: str, right: str) -> Relation | None:
    try:
        return Relation("=", difference(left, right))
    except Unreadable:
        return None


def _is_name(text: str) -> bool:
    return bool(_NAME.fullmatch(text)) and text not in ("NOT", "NO", "OR", "AND", "π")


def _name(text: str) -> str:
    return re.sub("[ {}]|m? ?∠", "", text)


def _says_nothing_of(name: str, value: str) -> bool:
    """Return whether there is a value, and the name is not part of it, as it is in x = 2x + 1."""
    return bool(value) and not (len(name) == 1 and re.search(rf"(?<![\\A-Za-z]){name}", value))


_COLON = re.compile(":")


def _read_ratio(text: str, level: int) -> Ratio | Words | None:
    """Read a ratio; or dimensions, whole numbers with × between, which are not worked out."""
    if ":" in text:
        parts = _split(text, _COLON)
        if any(map(is_label, parts)):
            return Words(text)  # from 9:05-10:00
        terms = tuple(map(Formula, parts))
        return Words(text) if any(term.dimensions for term in terms) else Ratio(":", terms)
    parts = re.split(" ?[×x] ?", text)
    if len(parts) > 1 and all(part.isdecimal() for part in parts) and len(parts) <= 4:
        return Ratio("×", tuple(Formula(part) for part in parts))
    return None


def _read_formula(text: str, level: int) -> Formula | Infinity:
    if text.replace(" ", "") in ("∞", "+∞", "-∞"):
        return Infinity("-" if "-" in text else "+")
    return Formula(text)
