"""The report of an experiment, as a page and as Markdown, both made from the same sections.

OUTPUT/report.html is one file that needs nothing else; `..report.page` says what it must keep to.
OUTPUT/report.md says the same in text and tables, and shows its main plots in one picture,
OUTPUT/report.svg: these two can be kept in a repository.
"""

import json
from itertools import groupby
from pathlib import Path

from ..files import write_text
from ..report import page
from ..report.page import text
from ..report.svg import standalone
from . import markdown
from .plots import Plot, numbers
from .render import render_plot
from .results import BASE, Results, read_results
from .sections import Block, Sample, Section, caption, main_plots, sections
from .tables import Table, Value, headline

LAYOUT = {Table: "stack", Plot: "grid wide-grid", Sample: "grid", dict: "stack"}
"""The CSS classes that place blocks of a kind on the page."""

WAY_OUT = "check the folder and its disk"


def write_report(output: Path) -> Path:
    """Write report.html, report.md and report.svg into the experiment's folder `output`.

    Returns the page's path. Cells may be missing or failed; report.svg is only written once there
    is something to plot. Raises UserError for a damaged file, for a folder that holds no
    experiment, and where a file cannot be written.
    """
    results = read_results(output)
    found = sections(results)
    _write_markdown(results, found, output / "report.md")
    return _write_page(results, found, output / "report.html")


def write_markdown(output: Path, path: Path) -> Path:
    """Write the report of the experiment in `output` to `path` (NAME.md), and NAME.svg beside it.

    Returns `path`; raises UserError as `write_report` does.
    """
    results = read_results(output)
    return _write_markdown(results, sections(results), path)


def _about(results: Results) -> str:
    return f"experiment {results.about['preset']} · {results.about['axis']['label']}"


def _write_page(results: Results, found: list[Section], path: Path) -> Path:
    first, details = headline(results)
    base = (cell.folder / "images" for cell in results.cells if cell.variant == BASE)
    images = next(base, results.output)
    content = page.html_page(
        model=text(results.about["model"]),
        about=text(_about(results)),
        headline=text(first.replace("-", "\N{NON-BREAKING HYPHEN}")),
        progress="<br>".join(map(text, details)),
        sections="\n".join(_html(section, images) for section in found),
    )
    write_text(path, content, WAY_OUT)
    return path


def _html(section: Section, images: Path) -> str:
    groups = "".join(
        f'<div class="{LAYOUT[kind]}">{"".join(_html_block(each, images) for each in blocks)}</div>'
        for kind, blocks in groupby(section.blocks, key=type)
    )
    return page.section(
        text(section.title),
        f'<div class="stack">{groups}</div>',
        "<br>".join(map(text, section.lines)),
    )


def _html_block(block: Block, images: Path) -> str:
    match block:
        case Table():
            return _html_table(block)
        case Plot():
            title = f"<figcaption>{text(block.title)}</figcaption>"
            note = f'<p class="soft">{text(block.note)}</p>' if block.note else ""
            return f'<figure class="card">{title}{render_plot(block)}{note}</figure>'
        case Sample():
            image = page.image(images, block.image) if block.image else ""
            answers = "".join(
                page.answer(text(label), output, correct)
                for label, output, correct in block.answers
            )
            return page.sample_card(image, block.problem, block.solution, answers)
        case _:
            return page.settings_table(block)


def _html_table(table: Table) -> str:
    heads = "".join(f"<th>{text(head)}</th>" for head in table.head)
    rows = "".join(f"<tr>{''.join(map(_html_cell, row))}</tr>" for row in table.rows)
    title = f"<figcaption>{text(table.title)}</figcaption>"
    note = f'<p class="soft">{text(table.note)}</p>' if table.note else ""
    return f"""<figure class="card">{title}{note}<div class="scroll"><table>
<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div></figure>"""


def _html_cell(cell: str | Value) -> str:
    if not isinstance(cell, Value):
        return f"<td>{text(cell)}</td>"
    bar = page.bar(cell.bar.value, cell.bar.low, cell.bar.high) if cell.bar else ""
    return f'<td>{text(cell.main)} <span class="soft">{text(cell.detail)}</span>{bar}</td>'


def _write_markdown(results: Results, found: list[Section], path: Path) -> Path:
    first, details = headline(results)
    title = f"{results.about['model']} · {_about(results)}"
    parts = [f"# {markdown.inline(title)}"]
    if plots := main_plots(found):
        picture = path.with_suffix(".svg")
        content = standalone([(page.printable(plot.title)[0], render_plot(plot)) for plot in plots])
        write_text(picture, content, WAY_OUT)
        about = markdown.inline(caption(results, plots))
        parts += [f"![{about}]({picture.name})", about]
    parts += [f"**{markdown.inline(first)}**", *map(markdown.inline, details)]
    parts += map(_markdown, found)
    write_text(path, "\n\n".join(parts) + "\n", WAY_OUT)
    return path


def _markdown(section: Section) -> str:
    lines = [f"## {markdown.inline(section.title)}", *map(markdown.inline, section.lines)]
    return "\n\n".join(filter(None, [*lines, *map(_markdown_block, section.blocks)]))


def _markdown_block(block: Block) -> str:
    match block:
        case Table():
            return markdown.table(block)
        case Plot():
            # The numbers of the other kinds are in a table of the section already.
            return markdown.table(numbers(block)) if block.kind in ("curves", "dots") else ""
        case Sample():
            return _markdown_sample(block)
        case _:
            return markdown.fence(json.dumps(block, indent=1, ensure_ascii=False, default=str))


def _markdown_sample(sample: Sample) -> str:
    lines = [f"**{markdown.inline(sample.task)}**", markdown.fence(sample.problem)]
    lines += ["Right answer:", markdown.fence(sample.solution)]
    for label, output, correct in sample.answers:
        verdict = "✓ right" if correct else "✗ wrong"
        lines += [f"{markdown.inline(label)} {verdict}", markdown.fence(output)]
    return "\n\n".join(lines)
