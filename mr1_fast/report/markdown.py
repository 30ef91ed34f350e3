"""Text from elsewhere as GitHub's Markdown, which no text can break out of."""

import re

from .page import printable

# Two things stay as they are, so that the raw text is easy to read: an interval such as [1.2, 3.4]
# that no link follows, and "< 0.001", which is no tag. GitHub makes links of bare addresses, by
# their "://" or "www.".
_MARKUP = re.compile(
    r"(\[[−\d., ]+\](?![(\[:])|< (?=\d))|[!\"#$&*<>@\[\\\]^_`{|}~]|:(?=//)|(?i:(?<=www)\.)"
)


def inline(value: object) -> str:
    """Text within a line or a table's cell: what could be markup becomes a character reference."""
    shown, note = printable(value)
    safe = _MARKUP.sub(lambda found: found[1] or f"&#{ord(found[0])};", " ".join(shown.split()))
    return safe + note


def fence(value: object, language: str = "text") -> str:
    """Text of any number of lines as a code block, fenced by more backticks than it holds."""
    shown, note = printable(value)
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", shown)), default=0))
    return f"{ticks}{language}\n{shown}\n{ticks}\n" + (note and f"\n{note}\n")
