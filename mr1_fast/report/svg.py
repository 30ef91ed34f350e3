"""Plots as SVG: as elements of a page, whose colours they follow, or as files of their own."""

import html
import io
import re
from collections.abc import Callable, Sequence

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

INK, GRID, SOFT = "#010101", "#020202", "#030303"
LINES = ("#010201", "#010301", "#010401", "#010501", "#010601", "#010701")
PAGE_COLOURS = {INK: "--ink", GRID: "--grid", SOFT: "--soft"} | {
    line: f"--line{n}" for n, line in enumerate(LINES)
}
"""Stand-in colours that plots are drawn in → the CSS variables that replace them."""

LIGHT = {
    "--page": "#f6f5f2",
    "--card": "#fff",
    "--ink": "#23262d",
    "--soft": "#666b76",
    "--grid": "#dcdde1",
    "--line0": "#1f6fd0",
    "--line1": "#c2570c",
    "--line2": "#0d8a6a",
    "--line3": "#8a3fc4",
    "--line4": "#b5256e",
    "--line5": "#6d7a12",
    "--good": "#0b7a43",
    "--bad": "#b3261e",
}

DARK = {
    "--page": "#14161a",
    "--card": "#1e2127",
    "--ink": "#e7e8ea",
    "--soft": "#a0a5b0",
    "--grid": "#3a3f49",
    "--line0": "#6cb0ff",
    "--line1": "#ff9f5a",
    "--line2": "#4fd1a5",
    "--line3": "#c9a0ff",
    "--line4": "#ff8dc0",
    "--line5": "#ccd45a",
    "--good": "#6fdc9f",
    "--bad": "#ff9089",
}
"""The values of the page's CSS variables in the light and in the dark colour scheme."""

STYLE = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
STYLE |= dict.fromkeys(("axes.edgecolor", "grid.color"), GRID)
STYLE |= {
    "svg.fonttype": "none",
    "svg.hashsalt": "mr1_fast",
    "font.size": 10,
    "text.parse_math": False,
}

_FONTS = "system-ui, 'Segoe UI', Roboto, 'Liberation Sans', 'DejaVu Sans', sans-serif"
_TITLE_HEIGHT, _GAP = 26, 28
"""The height of a title in a file of plots, and the space between two plots, in points."""


def plot_element(name: str, label: str, draw: Callable[[Axes], None], height: float = 2.9) -> str:
    """An SVG element of what `draw` plots, whose colours are variables of the page.

    `name` must be unique in the page, and `label` describes the plot to screen readers. `height` is
    in inches, for a width of 4.8 inches; a legend of several lines adds to it.
    """
    with matplotlib.rc_context(STYLE):
        figure = Figure(layout="constrained")
        axes = figure.add_subplot()
        draw(axes)
        labels = axes.get_legend_handles_labels()[1]
        columns = _legend_columns(labels)
        legend_lines = -(-len(labels) // columns)
        figure.set_size_inches(4.8, height + 0.2 * (legend_lines - 1 if labels else 0))
        if len(labels) > 1:
            figure.legend(loc="outside upper left", ncols=columns, frameon=False)
        axes.spines[["top", "right"]].set_visible(False)
        drawn = _svg(figure)

    described = f'<svg role="img" aria-label="{html.escape(label)}"'
    drawn = drawn[drawn.index("<svg") :].replace("<svg", described, 1)
    for colour, variable in PAGE_COLOURS.items():
        drawn = drawn.replace(colour, f"var({variable})")

    # Matplotlib numbers the parts of every plot alike, but an id must be unique in a page.
    prefix = re.sub(r"[^a-z0-9]", "-", name.lower())
    return re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{prefix}-", drawn)


def standalone(plots: Sequence[tuple[str, str]], columns: int | None = None) -> str:
    """The content of an SVG file that shows plots side by side, in the light colours.

    Each plot is a title and an element of `plot_element`. After `columns` of them a new row begins;
    None: all are in one row. The background is white, so that the file can be read on a dark page
    too.
    """
    parts, left, top, right, lowest = [], 0.0, 0.0, 0.0, 0.0
    for number, (title, element) in enumerate(plots):
        if columns and number and number % columns == 0:
            left, top = 0.0, lowest + _GAP
        width, height = map(float, re.search(r'viewBox="0 0 (\S+) (\S+)"', element).groups())
        above = top + _TITLE_HEIGHT
        size = f'x="{left:g}" y="{above:g}" width="{width:g}" height="{height:g}"'
        look = f'x="{left + 12:g}" y="{top + 20:g}" font-weight="600"'
        parts.append(f"<text {look}>{html.escape(title)}</text>")
        parts.append(re.sub(r'width="\S+pt" height="\S+pt"', size, element, count=1))
        left, lowest = left + width + _GAP, max(lowest, above + height)
        right = max(right, left)

    width = right - _GAP
    drawn = "\n".join(
        [
            f'<svg xmlns="http://www.w3.org/2000/svg" xmlns:xlink="http://www.w3.org/1999/xlink"'
            f' viewBox="0 0 {width:g} {lowest:g}" width="{width:g}pt" height="{lowest:g}pt">',
            '<rect width="100%" height="100%" fill="#ffffff"/>',
            f'<g font-family="{_FONTS}" font-size="12" fill="var(--ink)">',
            *parts,
            "</g></svg>\n",
        ]
    )
    for variable, colour in LIGHT.items():
        drawn = drawn.replace(f"var({variable})", colour)
    return drawn


def _svg(figure: Figure) -> str:
    """The figure as an SVG document that depends on nothing but what is drawn."""
    buffer = io.StringIO()
    no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    return buffer.getvalue()


def _legend_columns(labels: list[str]) -> int:
    """How many columns of a legend with these labels fit into the width of a plot."""
    for columns in (4, 3, 2):
        letters = [max(map(len, part), default=0) for part in np.array_split(labels, columns)]
        if sum(letters) + 7 * columns <= 56:
            return columns
    return 1
