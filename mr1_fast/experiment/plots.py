"""The plots of an experiment as plain data.

`render.py` renders them for the page, and the Markdown shows them as tables of numbers.
"""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .results import BASE, MODES, CellResult, Results
from .statistics import Estimate, accuracy
from .tables import MISSING, Table, percent

MOST_POINTS = 60
"""The most points of a curve: longer runs are averaged in blocks, which keeps the page small."""

MOST_ROWS = 11
"""The most steps of a curve that a table shows."""

Points = dict[float, float]
"""x → y."""


@dataclass
class Series:
    """What a plot shows of one variant, or of one mode in a plot of all variants."""

    label: str
    style: int | None
    """Number of its colour, marker and dashes; None stands for those of the base model."""
    points: Points
    """The means over seeds."""
    seeds: list[Points] = field(default_factory=list)
    """The points of each seed."""
    intervals: list[Estimate] = field(default_factory=list)
    """The interval of each point, in plots of the kinds values and names."""
    base: float | None = None
    """The base model's y, in plots of these kinds."""


@dataclass
class Plot:
    """Series in one pair of axes."""

    kind: str
    """What is plotted.

    curves: y over training steps
    dots:   a dot for each variant
    values: y over the values of a setting
    names:  y for each of `names`, whose indices are the x of the points
    """
    name: str
    """A name that is unique in the report."""
    title: str
    x: str
    """The label of the x axis."""
    y: str
    """The label of the y axis."""
    series: list[Series] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    percent: bool = False
    """Whether y is a share, shown in percent."""
    note: str = ""


def learning_curves(results: Results) -> list[Plot]:
    """Accuracy on validation items over training steps, for each task trained and each tested."""
    plots = []
    for trained in results.about["trained"]:
        for tested in results.tasks:
            title = f"Trained on {trained}, tested on {tested}"
            plot = Plot(
                "curves", f"curve-{trained}-{tested}", title, "step", "accuracy", percent=True
            )
            plots.append(_over_steps(plot, results, trained, CellResult.curve, tested))
    return [plot for plot in plots if plot.series]


def training_curves(results: Results) -> list[Plot]:
    """Reward, accuracy, KL weight and KL over training steps, for each task trained."""
    shown = {
        "reward": "reward",
        "accuracy": "accuracy",
        "beta": "KL weight β(s)",
        "kl": "KL to the reference",
    }
    plots = []
    for column, label in shown.items():
        for trained in results.about["trained"]:
            title = f"Training on {trained}: {label}"
            plot = Plot("curves", f"metrics-{trained}-{column}", title, "step", label)
            plot.percent = label == "accuracy"
            plots.append(_over_steps(plot, results, trained, CellResult.metrics, column))
    return [plot for plot in plots if plot.series]


def _over_steps(
    plot: Plot,
    results: Results,
    trained: str,
    read: Callable[[CellResult], dict[str, np.ndarray]],
    column: str,
) -> Plot:
    """Add a series for each method to the plot, and return it.

    `read` gives the arrays of a cell, and `column` is the one that is plotted. Means over seeds go
    as far as all seeds have come.
    """
    runs = {
        method: [read(cell) for cell in results.of(method, trained)] for method in results.methods
    }
    longest = max((len(columns["step"]) for seeds in runs.values() for columns in seeds), default=0)
    width = -(-longest // MOST_POINTS)
    for style, (method, seeds) in enumerate(runs.items()):
        curves = [
            _blocks(columns["step"], columns[column], width)
            for columns in seeds
            if column in columns
        ]
        curves = [curve for curve in curves if curve]
        if not curves:
            continue
        shared = sorted(set.intersection(*map(set, curves)))
        mean = {x: float(np.mean([curve[x] for curve in curves])) for x in shared}
        thin = curves if len(curves) > 1 else []
        plot.series.append(Series(results.label(method), style, mean, thin))
    plot.note = f"Each point is the mean of {width} steps." if width > 1 else ""
    return plot


def _blocks(steps: np.ndarray, values: np.ndarray, width: int) -> Points:
    """The means of the finite values of every `width` steps; x is the middle of the steps."""
    finite = np.isfinite(steps) & np.isfinite(values)
    steps, values = steps[finite], values[finite]
    middles = steps // width * width + (width - 1) / 2
    return {float(middle): float(values[middles == middle].mean()) for middle in np.unique(middles)}


def gain_and_transfer(results: Results) -> list[Plot]:
    """A dot for each variant: accuracy on the trained task, and on the other task.

    There is a plot for each task trained and each other task tested."""
    plots = []
    styles: list[int | None] = [None, *range(len(results.methods))]
    for trained, tested in results.pairs(same=False):
        plot = Plot(
            "dots",
            f"transfer-{trained}-{tested}",
            f"Trained on {trained}",
            f"accuracy on {trained}",
            f"accuracy on {tested}",
            percent=True,
        )
        for style, variant in zip(styles, [BASE, *results.methods], strict=True):
            own = results.runs(variant, (trained, trained), "greedy")
            other = results.runs(variant, (trained, tested), "greedy")
            dots = [(float(own[seed].mean()), float(other[seed].mean())) for seed in own]
            if dots:
                x, y = np.mean(dots, axis=0).tolist()
                plot.series.append(
                    Series(results.label(variant), style, {x: y}, [{x: y} for x, y in dots])
                )
        if plot.series:
            plots.append(plot)
    return plots


def by_value(results: Results) -> list[Plot]:
    """Accuracy with its interval over what an ablation varies.

    There is a plot for each task trained and each tested, with a series for each mode."""
    axis, plots = results.about["axis"], []
    value = {variant["name"]: variant.get("value") for variant in results.about["variants"]}
    for pair in results.pairs(same=True) + results.pairs(same=False):
        trained = [method for method in results.methods if pair[0] in results.trained_on(method)]
        places = {
            method: value[method] if axis["numeric"] else at for at, method in enumerate(trained)
        }
        title = f"Trained on {pair[0]}, tested on {pair[1]}"
        plot = Plot(
            "values", f"value-{pair[0]}-{pair[1]}", title, axis["label"], "accuracy", percent=True
        )
        if not axis["numeric"]:
            plot.kind, plot.names = "names", [results.label(method) for method in places]
        for style, mode in enumerate(MODES):
            runs = {
                at: list(results.runs(method, pair, mode).values()) for method, at in places.items()
            }
            found = {at: accuracy(seeds) for at, seeds in sorted(runs.items()) if seeds}
            base = list(results.runs(BASE, pair, mode).values())
            if not found:
                continue
            series = Series(mode, style, {at: estimate.value for at, estimate in found.items()})
            series.intervals = list(found.values())
            series.base = accuracy(base).value if base else None
            plot.series.append(series)
        if plot.series:
            plots.append(plot)
    return plots


def numbers(plot: Plot) -> Table:
    """The table of a plot: some of the steps of curves, or a row for each dot."""
    show = percent if plot.percent else lambda value: f"{value:.3g}"
    if plot.kind == "dots":
        rows = [
            [series.label, *map(show, point)]
            for series in plot.series
            for point in series.points.items()
        ]
        return Table(plot.title, ["", plot.x, plot.y], rows, plot.note)
    steps = sorted(set().union(*(series.points for series in plot.series)))
    chosen = sorted(
        {steps[round(at)] for at in np.linspace(0, len(steps) - 1, MOST_ROWS)} if steps else ()
    )
    rows = [
        [
            f"{step:g}",
            *(show(each.points[step]) if step in each.points else MISSING for each in plot.series),
        ]
        for step in chosen
    ]
    return Table(
        f"{plot.title} ({plot.y})",
        [plot.x, *(series.label for series in plot.series)],
        rows,
        plot.note,
    )
