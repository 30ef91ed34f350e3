"""Reading dates and times of day."""

import re
from datetime import date

from .kinds import Clock, Words

_MONTHS = ["jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec"]
_MONTH = (
    r"(jan(?:uary)?|feb(?:ruary)?|mar(?:ch)?|apr(?:il)?|may|june?|july?|aug(?:ust)?|"
    r"sept?(?:ember)?|oct(?:ober)?|nov(?:ember)?|dec(?:ember)?)\.?"
)
_DATES = [
    (re.compile(r"(\d{4})([-/.])(\d{1,2})\2(\d{1,2})"), (1, 3, 4)),
    (re.compile(r"(\d{4}) ?年 ?(\d{1,2}) ?月 ?(\d{1,2}) ?日"), (1, 2, 3)),
    (
        re.compile(rf"{_MONTH} (\d{{1,2}})(?:st|nd|rd|th)?(?:,? (\d{{4}}))?", re.IGNORECASE),
        (3, 1, 2),
    ),
    (
        re.compile(
            rf"(\d{{1,2}})(?:st|nd|rd|th)?(?: of)? {_MONTH}(?:,? (\d{{4}}))?", re.IGNORECASE
        ),
        (3, 2, 1),
    ),
]


_NO_YEAR = 4
"""The year of a date without one: a leap year that nobody means."""


def read_date(text: str, level: int) -> date | Words | None:
    """Read a date, with or without a year; Words if there is no such day."""
    for pattern, (year, month, day) in _DATES:
        if found := pattern.fullmatch(text):
            name = found[month][:3].lower()
            number = _MONTHS.index(name) + 1 if name in _MONTHS else int(found[month])
            try:
                return date(int(found[year] or _NO_YEAR), number, int(found[day]))
            except ValueError:
                return Words(text)
    return None


_CLOCK = re.compile(
    r"(\d{1,2})(?::([0-5]\d)(?::([0-5]\d))?|(?= ?[apo]))(?: ?o'clock)?(?: ?([ap])\.?m\.?)?",
    re.IGNORECASE,
)


def read_clock(text: str, level: int) -> Clock | None:
    """Read a time of day, such as 9:05, 3 pm or 3 o'clock."""
    found = _CLOCK.fullmatch(text)
    if not found:
        return None
    hours, half = int(found[1]), (found[4] or "").lower()
    if half:
        if not 1 <= hours <= 12:
            return None
        hours = hours % 12 + (12 if half == "p" else 0)
    return Clock(hours, int(found[2] or 0), int(found[3] or 0))
