"""Pages with generated blocks: what stands between `<!-- claim: NAME -->` and `<!-- /claim -->`."""

import re
from pathlib import Path

from mr1_fast.errors import UserError
from mr1_fast.files import write_text

from .blocks import Blocks

_MARK = re.compile(r"<!-- claim: (?P<name>[^\n]*?) -->|<!-- /claim -->")
_INLINE = ("progress", "accuracy ", "difference ", "pull ")
"""How the names of blocks begin that stand in a line; others are paragraphs of their own."""


def pages(root: Path) -> list[Path]:
    """The pages of the repository in `root` that have generated blocks."""
    found = [root / "README.md", *sorted((root / "docs").rglob("*.md"))]
    return [page for page in found if page.exists() and _MARK.search(_text(page))]


def filled(page: Path, blocks: Blocks) -> str:
    """The text of a page with all its blocks made again.

    Raises UserError for an unknown name, and for a block that does not begin or does not end.
    """
    text, parts, at, name = _text(page), [], 0, None
    for mark in _MARK.finditer(text):
        where = f"{page} line {text.count(chr(10), 0, mark.start()) + 1}"
        opened = mark["name"]
        if (opened is None) == (name is None):
            wrong = "ends a block that has not begun" if name is None else "begins one in another"
            raise UserError(
                f"{where} {wrong}: write <!-- claim: NAME --> before a block and <!-- /claim --> "
                "behind it."
            )
        if opened is None:
            made = blocks[name]()
            parts.append(made if name.startswith(_INLINE) else f"\n\n{made}\n\n")
            parts.append(mark[0])
        else:
            if opened not in blocks:
                raise UserError(
                    f"{where} has the block {opened!r}, which there is not: choose one that "
                    "`python -m benchmarks.claim show` names."
                )
            parts.append(text[at : mark.end()])
        name, at = opened, mark.end()
    if name is not None:
        raise UserError(f"{page} does not end the block {name!r}: write <!-- /claim --> behind it.")
    return "".join([*parts, text[at:]])


def fill(root: Path, blocks: Blocks) -> list[Path]:
    """Make again the blocks of all pages in `root`; returns the pages that have changed.

    No page is written unless all can be.
    """
    made = {page: filled(page, blocks) for page in pages(root)}
    changed = [page for page, text in made.items() if text != _text(page)]
    for page in changed:
        write_text(page, made[page])
    return changed


def _text(page: Path) -> str:
    return page.read_text(encoding="utf-8")
