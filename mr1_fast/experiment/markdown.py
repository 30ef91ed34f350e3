"""Tables of an experiment as GitHub's Markdown, which no text can break out of."""

from ..report.markdown import fence, inline
from .tables import Table, Value

__all__ = ["fence", "inline", "table"]


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
