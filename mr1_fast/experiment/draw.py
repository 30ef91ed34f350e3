"""Drawing the plots of an experiment as SVG whose colours follow the page's."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ..report.page import LINES, SOFT, printable, svg
from .plots import Plot, Series

MARKERS, DASHES = ("o", "s", "^", "D", "v", "P", "X"), ("-", "--", "-.", ":")
"""Beside the colours, so that variants can be told apart without them."""
FEW = 12
"""Points of a curve that are marked."""


def draw(plot: Plot) -> str:
    """The plot as an SVG element."""

    def onto(axes: Axes) -> None:
        names = plot.kind == "names"
        axes.set(
            xlabel=printable(plot.y if names else plot.x)[0],
            ylabel="" if names else printable(plot.y)[0],
        )
        _KINDS[plot.kind](axes, plot)
        if plot.percent:
            _in_percent(axes.xaxis if names else axes.yaxis)
        axes.grid(axis="x" if names else "y", linewidth=0.8)

    return svg(plot.name, plot.title, onto, height=1 + 0.3 * len(plot.names) if plot.names else 2.9)


def _curves(axes: Axes, plot: Plot) -> None:
    for series in plot.series:
        colour, marker, dashes = _look(series)
        for seed in series.seeds:
            axes.plot(
                list(seed), list(seed.values()), dashes, color=colour, linewidth=0.8, alpha=0.45
            )
        marker = marker if len(series.points) <= FEW else ""
        x, y = list(series.points), list(series.points.values())
        axes.plot(
            x,
            y,
            dashes,
            color=colour,
            linewidth=2,
            marker=marker,
            markersize=5,
            label=_label(series),
        )
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    _from_zero(axes)


def _dots(axes: Axes, plot: Plot) -> None:
    """A small dot a seed, a large one their mean."""
    for series in plot.series:
        colour, marker, _ = _look(series)
        for seed in series.seeds:
            axes.plot(
                list(seed), list(seed.values()), marker, color=colour, markersize=4, alpha=0.45
            )
        x, y = list(series.points), list(series.points.values())
        axes.plot(x, y, marker, color=colour, markersize=9, label=_label(series))
    axes.margins(0.12)
    _in_percent(axes.xaxis)


def _values(axes: Axes, plot: Plot) -> None:
    places = [x for series in plot.series for x in series.points]
    step = 0.012 * (max(places) - min(places))  # bars of the same value side by side
    for number, series in enumerate(plot.series):
        colour, marker, dashes = _look(series)
        x, y = np.array(list(series.points)) + (number - 0.5) * step, list(series.points.values())
        axes.errorbar(
            x,
            y,
            yerr=_reach(series),
            color=colour,
            linestyle=dashes,
            marker=marker,
            **_BARS,
            label=_label(series),
        )
        if series.base is not None:
            axes.axhline(series.base, color=colour, linestyle=":", label=f"base, {_label(series)}")
    _from_zero(axes)


def _names(axes: Axes, plot: Plot) -> None:
    """On its side, for names are read along a line."""
    for number, series in enumerate(plot.series):
        colour, marker, _ = _look(series)
        y, x = np.array(list(series.points)) + (number - 0.5) * 0.24, list(series.points.values())
        axes.errorbar(
            x,
            y,
            xerr=_reach(series),
            color=colour,
            linestyle="",
            marker=marker,
            **_BARS,
            label=_label(series),
        )
        if series.base is not None:
            axes.axvline(series.base, color=colour, linestyle=":", label=f"base, {_label(series)}")
    axes.set_yticks(range(len(plot.names)), [printable(name)[0] for name in plot.names])
    axes.set_ylim(len(plot.names) - 0.5, -0.5)


_KINDS = {"curves": _curves, "dots": _dots, "values": _values, "names": _names}
_BARS = {"markersize": 5, "elinewidth": 1.4, "capsize": 3, "linewidth": 2}


def _look(series: Series) -> tuple[str, str, str]:
    """Colour, marker and dashes."""
    if series.style is None:
        return SOFT, "*", "-"
    return tuple(kind[series.style % len(kind)] for kind in (LINES, MARKERS, DASHES))


def _label(series: Series) -> str:
    return printable(series.label)[0]


def _reach(series: Series) -> np.ndarray:
    """How far the intervals reach below and above the points."""
    return np.transpose(
        [(each.value - each.low, each.high - each.value) for each in series.intervals]
    )


def _from_zero(axes: Axes) -> None:
    if axes.dataLim.y0 >= 0 and axes.dataLim.y1 > 0:
        axes.set_ylim(0, 1.05 * axes.dataLim.y1)


def _in_percent(axis: Axis) -> None:
    low, high = axis.get_view_interval()
    axis.set_major_formatter(PercentFormatter(xmax=1, decimals=0 if high - low > 0.05 else 1))
    axis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
