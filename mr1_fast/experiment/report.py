"""The report of an experiment: OUTPUT/report.html, one page that needs nothing else, and the same as OUTPUT/report.md.

Both are made from the same sections, as far as the experiment has come. What the page must keep to is in `..page`.
"""

import json
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

from ..report import page
from ..report.page import text
from . import markdown
from .draw import draw
from .plots import Plot, by_value, gain_and_transfer, learning_curves, numbers, training_curves
from .results import BASE, MODES, CellResult, Results, read_results
from .tables import Table, Value, cells, headline, main_tables

FACTS = ("command", "date", "hardware", "model", "versions")
"""Of experiment.json, at the end of the report."""


@dataclass
class Sample:
    """A test item with what the models answered."""

    task: str
    problem: object
    solution: object
    image: str | None
    answers: list[tuple[str, object, bool]] = field(default_factory=list)
    """Whose answer, its text, and whether it is right."""


@dataclass
class Section:
    """A part of the report: `lines` are plain text."""

    title: str
    blocks: list[Table | Plot | Sample | dict]
    """A dict holds settings."""
    lines: list[str] = field(default_factory=list)


LAYOUT = {Table: "stack", Plot: "grid wide-grid", Sample: "grid", dict: "stack"}
"""How blocks of a kind stand on the page."""


def write_report(output: Path) -> Path:
    """Write `output`/report.html and report.md from what the experiment has recorded; returns the page's path.

    Cells may be missing or failed. UserError for a damaged file, or a folder that is no experiment.
    """
    results = read_results(output)
    first, details = headline(results)
    model, about = (
        results.about["model"],
        f"experiment {results.about['preset']} · {results.about['axis']['label']}",
    )
    sections = [section for section in _sections(results) if section.blocks]
    images = next(
        (cell.folder / "images" for cell in results.cells if cell.variant == BASE), output
    )
    parts = [
        f"# {markdown.inline(f'{model} · {about}')}",
        f"**{markdown.inline(first)}**",
        *map(markdown.inline, details),
    ]
    page.write(output / "report.md", "\n\n".join([*parts, *map(_markdown, sections)]) + "\n")
    content = page.PAGE.substitute(
        model=text(model),
        about=text(about),
        headline=text(first.replace("-", "\N{NON-BREAKING HYPHEN}")),
        progress="<br>".join(map(text, details)),
        sections="\n".join(_html(section, images) for section in sections),
    )
    return page.write(output / "report.html", content)


def tables_markdown(output: Path) -> str:
    """The main tables alone, of greedy answers, for a README."""
    return "\n".join(map(markdown.table, main_tables(read_results(output), MODES[0])))


def _sections(results: Results) -> list[Section]:
    about = results.about
    plots = [] if about["axis"]["name"] == "method" else by_value(results)
    bars = "Means over seeds with 95% intervals: Student's over seeds; Wilson's over items where seeds do not differ."
    bars += (
        " Noise, in the headline, is what paired tests with Holm's correction leave at p ≥ 0.05."
    )
    if about.get("paper") and not plots:
        bars += f" The paper's numbers are those of Qwen2-VL-{about['paper']}-Instruct on SuperCLEVR-200 and GeoQA:"
        bars += " where model or data are others here, compare the pattern, not the values."
    dots = "Up is better on the other task, right on the trained one. A dot a seed, a large one their mean; greedy."
    seeds = "Thick: mean of the seeds. Thin: each seed."
    facts = [[name.capitalize(), _fact(about[name])] for name in FACTS if about.get(name)]
    tests = [
        [task, *(str(each.get(key, "")) for key in ("about", "items", "split"))]
        for task, each in about["tasks"].items()
    ]
    return [
        Section("Accuracy", [*main_tables(results, MODES[0]), *plots], [bars]),
        Section("Gain and transfer", gain_and_transfer(results), [dots]),
        Section(
            "Held-out accuracy during training",
            learning_curves(results),
            [f"Greedy, validation items. {seeds}"],
        ),
        Section("Training", training_curves(results), [seeds]),
        Section("Test items and greedy answers", _samples(results)),
        Section(
            "Accuracy of sampled answers", main_tables(results, MODES[1]), ["One answer an item."]
        ),
        Section("Cells", [cells(results)]),
        Section(
            "How this was measured",
            [
                Table("Test items", ["Task", "What is asked", "Items", "Split"], tests),
                Table("Run", ["", ""], facts),
                about.get("settings") or {},
            ],
            list(map(str, about.get("notes", []))),
        ),
    ]


def _fact(value: object) -> str:
    return (
        ", ".join(f"{name} {version}" for name, version in value.items())
        if isinstance(value, dict)
        else str(value)
    )


def _samples(results: Results) -> list[Sample]:
    """The items that the cells of the first seed have recorded, with the answers of what was trained on their task."""
    items: dict[tuple, Sample] = {}
    first = [cell for cell in results.cells if cell.seed == results.about["seeds"][0]]
    for cell in first:
        for number, each in enumerate(cell.samples()):
            if cell.trained in (None, each.get("task")):
                key = (
                    str(each.get("task")),
                    number,
                    str(each.get("problem")),
                    str(each.get("solution")),
                )
                image = each.get("image")
                sample = items.setdefault(key, Sample(key[0], key[2], key[3], image and str(image)))
                sample.answers.append(
                    (_whose(results, cell), each.get("text", ""), each.get("correct") is True)
                )
    return list(items.values())


def _whose(results: Results, cell: CellResult) -> str:
    return results.label(cell.variant) if cell.trained else f"before: {results.label(cell.variant)}"


def _html(section: Section, images: Path) -> str:
    groups = "".join(
        f'<div class="{LAYOUT[kind]}">{"".join(_html_block(block, images) for block in blocks)}</div>'
        for kind, blocks in groupby(section.blocks, key=type)
    )
    return page.section(
        text(section.title),
        f'<div class="stack">{groups}</div>',
        "<br>".join(map(text, section.lines)),
    )


def _html_block(block: Table | Plot | Sample | dict, images: Path) -> str:
    if isinstance(block, Table):
        return _html_table(block)
    if isinstance(block, dict):
        return page.settings_table(block)
    if isinstance(block, Plot):
        note = f'<p class="soft">{text(block.note)}</p>' if block.note else ""
        return f'<figure class="card"><figcaption>{text(block.title)}</figcaption>{draw(block)}{note}</figure>'
    image = page.image(images, block.image) if block.image else ""
    answers = "".join(
        page.answer(text(label), output, correct) for label, output, correct in block.answers
    )
    return page.sample_card(image, block.problem, block.solution, answers)


def _html_table(table: Table) -> str:
    heads = "".join(f"<th>{text(head)}</th>" for head in table.head)
    rows = "".join(f"<tr>{''.join(map(_html_cell, row))}</tr>" for row in table.rows)
    note = f'<p class="soft">{text(table.note)}</p>' if table.note else ""
    return f"""<figure class="card"><figcaption>{text(table.title)}</figcaption>{note}<div class="scroll"><table>
<thead><tr>{heads}</tr></thead><tbody>{rows}</tbody></table></div></figure>"""


def _html_cell(cell: str | Value) -> str:
    if not isinstance(cell, Value):
        return f"<td>{text(cell)}</td>"
    bar = page.bar(cell.bar.value, cell.bar.low, cell.bar.high) if cell.bar else ""
    return f'<td>{text(cell.main)} <span class="soft">{text(cell.detail)}</span>{bar}</td>'


def _markdown(section: Section) -> str:
    lines = [f"## {markdown.inline(section.title)}", *map(markdown.inline, section.lines)]
    return "\n\n".join(filter(None, [*lines, *map(_markdown_block, section.blocks)]))


def _markdown_block(block: Table | Plot | Sample | dict) -> str:
    if isinstance(block, Table):
        return markdown.table(block)
    if isinstance(block, dict):
        return markdown.fence(json.dumps(block, indent=1, ensure_ascii=False, default=str))
    if isinstance(block, Plot):
        return (
            markdown.table(numbers(block)) if block.kind in ("curves", "dots") else ""
        )  # the others are a table's
    lines = [f"**{markdown.inline(block.task)}**", markdown.fence(block.problem)]
    lines += ["Right answer:", markdown.fence(block.solution)]
    for label, output, correct in block.answers:
        lines += [
            f"{markdown.inline(label)} {'✓ right' if correct else '✗ wrong'}",
            markdown.fence(output),
        ]
    return "\n\n".join(lines)
