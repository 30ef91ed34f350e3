"""Rendering the plots of an experiment as SVG elements, whose colours follow those of the page."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ..report.page import printable
from ..report.svg import LINES, SOFT, plot_element
from .plots import Plot, Series

MARKERS, DASHES = ("o", "s", "^", "D", "v", "P", "X"), ("-", "--", "-.", ":")
"""Variants differ in marker and dashes too, so that they can be told apart without colours."""

FEW = 12
"""The points of a curve are marked if there are at most this many."""

BARS = {"markersize": 5, "elinewidth": 1.4, "capsize": 3, "linewidth": 2}
"""The look of points with error bars."""


def render_plot(plot: Plot) -> str:
    """The plot as an SVG element."""

    def draw(axes: Axes) -> None:
        names = plot.kind == "names"
        axes.set(
            xlabel=printable(plot.y if names else plot.x)[0],
            ylabel="" if names else printable(plot.y)[0],
        )
        _KINDS[plot.kind](axes, plot)
        if plot.percent:
            _in_percent(axes.xaxis if names else axes.yaxis)
        axes.grid(axis="x" if names else "y", linewidth=0.8)

    height = 1 + 0.3 * len(plot.names) if plot.names else 2.9
    return plot_element(plot.name, printable(plot.title)[0], draw, height)


def _curves(axes: Axes, plot: Plot) -> None:
    """A thin line for each seed, a thick one for their mean."""
    for series in plot.series:
        colour, marker, dashes = _look(series)
        for seed in series.seeds:
            thin = {"color": colour, "linewidth": 0.8, "alpha": 0.45}
            axes.plot(list(seed), list(seed.values()), dashes, **thin)
        x, y = list(series.points), list(series.points.values())
        marker = marker if len(series.points) <= FEW else ""
        thick = {"color": colour, "linewidth": 2, "marker": marker, "markersize": 5}
        axes.plot(x, y, dashes, **thick, label=_label(series))
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    _from_zero(axes)


def _dots(axes: Axes, plot: Plot) -> None:
    """A small dot for each seed, a large one for their mean."""
    for series in plot.series:
        colour, marker, _ = _look(series)
        for seed in series.seeds:
            small = {"color": colour, "markersize": 4, "alpha": 0.45}
            axes.plot(list(seed), list(seed.values()), marker, **small)
        x, y = list(series.points), list(series.points.values())
        axes.plot(x, y, marker, color=colour, markersize=9, label=_label(series))
    axes.margins(0.12)
    _in_percent(axes.xaxis)


def _values(axes: Axes, plot: Plot) -> None:
    """A line with error bars for each series, and a dotted line for the base model."""
    places = [x for series in plot.series for x in series.points]
    step = 0.012 * (max(places) - min(places))  # puts the bars of one value side by side
    for number, series in enumerate(plot.series):
        colour, marker, dashes = _look(series)
        x, y = np.array(list(series.points)) + (number - 0.5) * step, list(series.points.values())
        look = {"color": colour, "linestyle": dashes, "marker": marker, **BARS}
        axes.errorbar(x, y, yerr=_reach(series), **look, label=_label(series))
        if series.base is not None:
            axes.axhline(series.base, color=colour, linestyle=":", label=f"base, {_label(series)}")
    _from_zero(axes)


def _names(axes: Axes, plot: Plot) -> None:
    """Points with error bars in a row for each name; names are easiest to read along a line."""
    for number, series in enumerate(plot.series):
        colour, marker, _ = _look(series)
        y, x = np.array(list(series.points)) + (number - 0.5) * 0.24, list(series.points.values())
        look = {"color": colour, "linestyle": "", "marker": marker, **BARS}
        axes.errorbar(x, y, xerr=_reach(series), **look, label=_label(series))
        if series.base is not None:
            axes.axvline(series.base, color=colour, linestyle=":", label=f"base, {_label(series)}")
    axes.set_yticks(range(len(plot.names)), [printable(name)[0] for name in plot.names])
    axes.set_ylim(len(plot.names) - 0.5, -0.5)


_KINDS = {"curves": _curves, "dots": _dots, "values": _values, "names": _names}


def _look(series: Series) -> tuple[str, str, str]:
    """Colour, marker and dashes of a series."""
    if series.style is None:
        return SOFT, "*", "-"
    return tuple(kind[series.style % len(kind)] for kind in (LINES, MARKERS, DASHES))


def _label(series: Series) -> str:
    return printable(series.label)[0]


def _reach(series: Series) -> np.ndarray:
    """How far the intervals reach below and above the points, of shape (2, points)."""
    reaches = [(each.value - each.low, each.high - each.value) for each in series.intervals]
    return np.transpose(reaches)


def _from_zero(axes: Axes) -> None:
    """Let the y axis begin at 0, if no value is negative and some are positive."""
    if axes.dataLim.y0 >= 0 and axes.dataLim.y1 > 0:
        axes.set_ylim(0, 1.05 * axes.dataLim.y1)


def _in_percent(axis: Axis) -> None:
    low, high = axis.get_view_interval()
    axis.set_major_formatter(PercentFormatter(xmax=1, decimals=0 if high - low > 0.05 else 1))
    axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
