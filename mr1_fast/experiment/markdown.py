"""Tables and text from elsewhere as GitHub's Markdown, which no text can break out of."""

import re

from ..report.page import printable
from .tables import Table, Value

# Two things stay as they are, so that the raw text is easy to read: an interval such as [1.2, 3.4]
# that no link follows, and "< 0.001", which is no tag.
_MARKUP = re.compile(r"(\[[−\d., ]+\](?![(\[:])|< (?=\d))|[!\"#$&*<>@\[\\\]^_`{|}~]")


def inline(value: object) -> str:
    """Text within a line or a table's cell: what could be markup becomes a character reference."""
    shown, note = printable(value)
    safe = _MARKUP.sub(lambda found: found[1] or f"&#{ord(found[0])};", " ".join(shown.split()))
    return safe + note


def fence(value: object) -> str:
    """Text of any number of lines as a code block, fenced by more backticks than it holds."""
    shown, note = printable(value)
    ticks = "`" * max(3, 1 + max(map(len, re.findall("`+", shown)), default=0))
    return f"{ticks}text\n{shown}\n{ticks}\n" + (note and f"\n{note}\n")


def table(source: Table) -> str:
    """A table below its title, and with its note."""
    lines = [source.head, ["---"] * len(source.head), *source.rows]
    rows = "\n".join(f"| {' | '.join(map(_cell, line))} |" for line in lines)
    note = f"\n{inline(source.note)}\n" if source.note else ""
    return f"**{inline(source.title)}**\n\n{rows}\n{note}"


def _cell(cell: str | Value) -> str:
    if isinstance(cell, Value):
        return f"{inline(cell.main)} {inline(cell.detail)}".strip()
    return cell if cell == "---" else inline(cell)
