"""The plots of an experiment as plain data: `draw.py` draws them, and Markdown gives them as tables of numbers."""

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np

from .results import BASE, MODES, CellResult, Results
from .statistics import Estimate, accuracy
from .tables import MISSING, Table, percent

MOST_POINTS = 60
"""More steps than these are averaged in blocks, which also keeps the page small."""
MOST_ROWS = 11
"""Steps of a curve that a table shows."""

Points = dict[float, float]
"""y by x."""


@dataclass
class Series:
    """What a plot shows of one variant, or of one mode in a plot of all variants."""

    label: str
    style: int | None
    """Which colour, marker and dashes it gets; None: those of the base model."""
    points: Points
    """The mean over seeds."""
    seeds: list[Points] = field(default_factory=list)
    intervals: list[Estimate] = field(default_factory=list)
    """Of each point, in plots of kind values or names."""
    base: float | None = None
    """The base model's y, in such plots."""


@dataclass
class Plot:
    """Series in one pair of axes."""

    kind: str
    """curves: over steps; dots: one each; values: against a number; names: against `names`, whose indices are x."""
    name: str
    title: str
    x: str
    y: str
    series: list[Series] = field(default_factory=list)
    names: list[str] = field(default_factory=list)
    percent: bool = False
    note: str = ""


def learning_curves(results: Results) -> list[Plot]:
    """Held-out accuracy over training steps, for each task trained and each tested."""
    plots = [
        _over_steps(
            results,
            trained,
            tested,
            CellResult.curve,
            f"Trained on {trained}, tested on {tested}",
            "accuracy",
        )
        for trained in results.about["trained"]
        for tested in results.tasks
    ]
    return [plot for plot in plots if plot.series]


def training_curves(results: Results) -> list[Plot]:
    """Reward, accuracy, KL weight and KL over training steps, for each task trained."""
    shown = {
        "reward": "reward",
        "accuracy": "accuracy",
        "beta": "KL weight β(s)",
        "kl": "KL to the reference",
    }
    plots = [
        _over_steps(
            results, trained, column, CellResult.metrics, f"Training on {trained}: {title}", title
        )
        for column, title in shown.items()
        for trained in results.about["trained"]
    ]
    return [plot for plot in plots if plot.series]


def _over_steps(
    results: Results,
    trained: str,
    column: str,
    read: Callable[[CellResult], dict],
    title: str,
    y: str,
) -> Plot:
    """A line a method: the mean over its seeds as far as all of them have come, and each seed."""
    plot = Plot(
        "curves", f"{read.__name__}-{trained}-{column}", title, "step", y, percent=y == "accuracy"
    )
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
        if curves:
            shared = sorted(set.intersection(*map(set, curves)))
            mean = {x: float(np.mean([curve[x] for curve in curves])) for x in shared}
            plot.series.append(
                Series(results.label(method), style, mean, curves if len(curves) > 1 else [])
            )
    plot.note = f"Each point is the mean of {width} steps." if width > 1 else ""
    return plot


def _blocks(steps: np.ndarray, values: np.ndarray, width: int) -> Points:
    """The mean of the finite values among every `width` steps, by the steps' middle."""
    finite = np.isfinite(steps) & np.isfinite(values)
    steps, values = steps[finite], values[finite]
    middles = steps // width * width + (width - 1) / 2
    return {float(middle): float(values[middles == middle].mean()) for middle in np.unique(middles)}


def gain_and_transfer(results: Results) -> list[Plot]:
    """Accuracy on the task trained against that on the other task, by variant."""
    plots = []
    for trained, tested in results.pairs(same=False):
        name, axes = (
            f"transfer-{trained}-{tested}",
            (f"accuracy on {trained}", f"accuracy on {tested}"),
        )
        plot = Plot("dots", name, f"Trained on {trained}", *axes, percent=True)
        for style, variant in zip(
            [None, *range(len(results.methods))], [BASE, *results.methods], strict=True
        ):
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
    """Accuracy with its interval by the value that an ablation varies, for each task trained and each tested."""
    axis, plots = results.about["axis"], []
    value = {variant["name"]: variant.get("value") for variant in results.about["variants"]}
    places = {
        method: value[method] if axis["numeric"] else at
        for at, method in enumerate(results.methods)
    }
    for pair in results.pairs(same=True) + results.pairs(same=False):
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
            series = Series(mode, style, {at: estimate.value for at, estimate in found.items()})
            series.intervals, series.base = (
                list(found.values()),
                accuracy(base).value if base else None,
            )
            plot.series += [series] if found else []
        if plot.series:
            plots.append(plot)
    return plots


def numbers(plot: Plot) -> Table:
    """Curves as a table of some of their steps, dots as a row each."""
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
