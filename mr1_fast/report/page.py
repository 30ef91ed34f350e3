"""What the HTML reports share: the page around a report, escaped text, metrics read back, plots and images.

A page is a single file: plots are inline SVG, images are data URIs, and its content policy forbids scripts and any
request. What models, data and settings say is hostile text, so everything passes `text` on its way in.
"""

import base64
import html
import io
import json
import math
import re
from collections.abc import Callable
from pathlib import Path
from string import Template

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from ..errors import UserError
from ..files import write_atomically

LONGEST_TEXT = 2000
"""Characters of an output that a report shows."""
IMAGE_SIDE = 448
"""Larger images are scaled down to this many pixels, so that the page stays small."""
INK, GRID, SOFT = "#010101", "#020202", "#030303"
LINES = ("#010201", "#010301", "#010401", "#010501", "#010601", "#010701")
PAGE_COLOURS = {INK: "--ink", GRID: "--grid", SOFT: "--soft"} | {
    line: f"--line{n}" for n, line in enumerate(LINES)
}
"""What the colours of a drawn SVG become: variables of the page, which differ between light and dark."""
STYLE = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
STYLE |= dict.fromkeys(("axes.edgecolor", "grid.color"), GRID)
STYLE |= {
    "svg.fonttype": "none",
    "svg.hashsalt": "mr1_fast",
    "font.size": 10,
    "text.parse_math": False,
}

PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>$model · $about</title><style>
:root { color-scheme: light dark; --page: #f6f5f2; --card: #fff; --ink: #23262d; --soft: #666b76; --grid: #dcdde1;
  --line0: #1f6fd0; --line1: #c2570c; --line2: #0d8a6a; --line3: #8a3fc4; --line4: #b5256e; --line5: #6d7a12;
  --good: #0b7a43; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --page: #14161a; --card: #1e2127; --ink: #e7e8ea; --soft: #a0a5b0;
  --grid: #3a3f49; --line0: #6cb0ff; --line1: #ff9f5a; --line2: #4fd1a5; --line3: #c9a0ff; --line4: #ff8dc0;
  --line5: #ccd45a; --good: #6fdc9f; --bad: #ff9089; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 74rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Liberation Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.05rem; font-weight: 500; margin: 0; } h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; }
.headline { font: 700 clamp(1.7rem, 6vw, 2.7rem)/1.15 system-ui, sans-serif; text-wrap: balance; margin: .5rem 0; }
.soft, thead th { color: var(--soft); font-size: .875rem; font-weight: 400; margin: .4rem 0; }
.card { background: var(--card); border: 1px solid var(--grid); border-radius: 12px; padding: 1rem; margin: 0; }
.stack { display: grid; gap: 1rem; } .grid > *, .stack > * { min-width: 0; }
.scroll { overflow-x: auto; overflow-wrap: break-word; }
.scroll td:first-child { white-space: nowrap; padding-right: 1rem; }
.grid { display: grid; gap: 1rem; --column: 20rem;
  grid-template-columns: repeat(auto-fill, minmax(min(100%, var(--column)), 1fr)); }
.wide-grid { --column: 30rem; }
figcaption, .question, summary { font-weight: 600; margin: 0 0 .25rem; }
svg { display: block; width: 100%; height: auto; } svg text { font-family: inherit !important; }
table { border-spacing: 0; width: 100%; font-variant-numeric: tabular-nums; }
table.card { max-width: 44rem; overflow-wrap: normal; } details table { font-size: .875rem; line-height: 1.2; }
th, td { text-align: left; vertical-align: top; padding: .5rem .5rem .5rem 0; border-top: 1px solid var(--grid); }
thead th, tbody:first-child tr:first-child > * { border-top: 0; }
td > b { font-size: 1.25rem; }
.bar { display: block; position: relative; height: 6px; margin: .5rem 0; border-radius: 3px; background: var(--grid); }
.bar i { position: absolute; height: 100%; border-radius: 3px; min-width: 4px; background: var(--line0); opacity: .5; }
.bar i + i { margin-left: -2px; opacity: 1; } .wide { width: 50%; }
.images { display: flex; flex-wrap: wrap; gap: .5rem; margin-bottom: .75rem; }
.images img { max-width: 100%; min-width: 168px; height: auto; border-radius: 6px; }
.mark { font-weight: 600; padding: .05rem .5rem; border: 1px solid; border-radius: 1rem; white-space: nowrap; }
.right { color: var(--good); } .wrong { color: var(--bad); border-style: dashed; }
.output { white-space: pre-wrap; font: .8125rem/1.45 ui-monospace, "DejaVu Sans Mono", monospace; max-height: 14rem;
  overflow: auto; background: var(--page); border-radius: 6px; padding: .5rem .6rem; unicode-bidi: isolate; }
</style></head><body><main>
<h1>$model · <span class="soft">$about</span></h1>
<p class="headline">$headline</p><p class="soft">$progress</p>
$sections
</main></body></html>
""")

# Control characters, direction overrides and surrogates would garble the page or could not be written at all.
_UNPRINTABLE = re.compile(
    r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]"
)


def printable(value: object) -> tuple[str, str]:
    """`value` with unprintable characters as visible stand-ins, cut if very long; and a note if it is cut, or ""."""
    whole = str(value).replace("\r\n", "\n")
    shown = _UNPRINTABLE.sub(
        lambda bad: chr(0x2400 + ord(bad[0])) if bad[0] < " " else "\ufffd", whole[:LONGEST_TEXT]
    )
    return shown, f" … cut: {LONGEST_TEXT:,} of {len(whole):,} characters shown" if len(
        whole
    ) > LONGEST_TEXT else ""


def text(value: object) -> str:
    """`value` as HTML text: markup is shown as text."""
    shown, note = printable(value)
    return html.escape(shown) + (note and f'<span class="soft">{note}</span>')


def section(title: str, content: str, note: str = "") -> str:
    """A heading, a soft line and `content`; all three are HTML."""
    note = note and f'<p class="soft">{note}</p>'
    return f"<section><h2>{title}</h2>{note}{content}</section>"


def bar(value: float, low: float, high: float) -> str:
    """A share and its interval as a bar."""
    return f"""<span class="bar"><i style="left:{low:.2%};width:{high - low:.2%}"></i>\
<i style="left:{value:.2%}"></i></span>"""


def answer(label: str, output: object, correct: bool) -> str:
    """A model's output below its label and verdict; `label` is HTML."""
    verdict, sign = ("right", "✓") if correct else ("wrong", "✗")
    shown = text(output) or '<span class="soft">(empty)</span>'
    mark = f'<b class="mark {verdict}">{sign} {verdict}</b>'
    return f'<p class="soft">{label} {mark}</p><div class="output">{shown}</div>'


def sample_card(images: str, problem: object, solution: object, answers: str) -> str:
    """An item with what models answered; `images` and `answers` are HTML."""
    return f"""<article class="card"><div class="images">{images}</div>
<p class="question">{text(problem)}</p>
<p class="soft">Right answer: <b>{text(solution)}</b></p>{answers}</article>"""


def settings_table(values: dict) -> str:
    """All settings, folded."""
    rows = "".join(
        f"<tr><th>{text(name)}</th><td>{text(value)}</td></tr>" for name, value in values.items()
    )
    summary = f"<summary>All {len(values)} settings</summary>"
    return f'<details class="card">{summary}<table><tbody>{rows}</tbody></table></details>'


def json_object(source: str, where: object) -> dict:
    """The JSON object that a text holds; UserError names `where` it stands if it holds none."""
    try:
        return dict(json.loads(source))
    except (ValueError, TypeError, RecursionError) as error:
        raise UserError(f"{where} is no JSON object: remove it.") from error


def read_metrics(path: Path) -> dict[str, np.ndarray]:
    """Each metric of a JSON-lines file over steps, NaN where it is missing or not finite; `step` is always there."""
    written = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    lines = written.split("\n")[
        :-1
    ]  # a line without its end is being written now, or the run was killed at it
    rows = [
        {"step": step, **json_object(line, f"{path} line {step + 1}")}
        for step, line in enumerate(lines)
    ]
    names = dict.fromkeys(["step", *(name for row in rows for name in row)])
    return {name: np.array([_number(row.get(name)) for row in rows]) for name in names}


def _number(value: object) -> float:
    # Axes overflow near the largest floats, and such a value says no more than inf does.
    return float(value) if isinstance(value, int | float) and abs(value) < 1e100 else math.nan


def svg(name: str, label: str, draw: Callable[[Axes], None], height: float = 2.9) -> str:
    """What `draw` plots, as an SVG element whose colours follow the page's; `name` must be unique in the page.

    `height` is in inches, of 4.8 in width; long legends add to it.
    """
    buffer = io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure = Figure(layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        labels = axes.get_legend_handles_labels()[1]
        columns = _legend_columns(labels)
        figure.set_size_inches(
            4.8, height + 0.2 * (-(-len(labels) // columns) - 1 if labels else 0)
        )
        if len(labels) > 1:
            figure.legend(loc="outside upper left", ncols=columns, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    drawn = buffer.getvalue()
    drawn = drawn[drawn.index("<svg") :].replace(
        "<svg", f'<svg role="img" aria-label="{html.escape(label)}"', 1
    )
    for colour, variable in PAGE_COLOURS.items():
        drawn = drawn.replace(colour, f"var({variable})")
    # Every plot numbers its parts alike, but an id must be unique in a page.
    return re.sub(
        r'(id="|url\(#|href="#)', rf"\g<1>{re.sub(r'[^a-z0-9]', '-', name.lower())}-", drawn
    )


def _legend_columns(labels: list[str]) -> int:
    """As many as fit into the width of a plot."""
    for columns in (4, 3, 2):
        letters = [max(map(len, part), default=0) for part in np.array_split(labels, columns)]
        if sum(letters) + 7 * columns <= 56:
            return columns
    return 1


def image(folder: Path, name: str) -> str:
    """The image as a data URI, scaled down if large; a note where it cannot be shown."""
    try:
        path = (folder / name).resolve()
        if not path.is_relative_to(
            folder.resolve()
        ):  # the page may be passed on: nothing from elsewhere gets into it
            raise ValueError("outside the folder")
        with Image.open(path) as opened:
            picture = opened.convert("RGB")
    except (
        OSError,
        ValueError,
        SyntaxError,
        Image.DecompressionBombError,
    ):  # SyntaxError: Pillow, of a broken PNG
        return f'<span class="soft">image {text(name)} cannot be shown</span>'
    picture.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img width="{picture.width}" height="{picture.height}" alt="" src="data:image/png;base64,{data}">'


def write(path: Path, content: str) -> Path:
    """Write all of `path` or nothing; UserError where it cannot be written."""
    try:
        write_atomically(path, content)
    except OSError as error:
        raise UserError(
            f"{path} cannot be written ({error.strerror}): check the folder and its disk."
        ) from error
    return path
