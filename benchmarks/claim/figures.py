"""The figure of each question, as an SVG file."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import (
    FuncFormatter,
    LogLocator,
    MaxNLocator,
    NullLocator,
    PercentFormatter,
)

from mr1_fast.experiment.results import BASE
from mr1_fast.experiment.statistics import Estimate
from mr1_fast.files import write_text
from mr1_fast.report.svg import LINES, plot_element, standalone

from .archive import Archive, Archived, Record
from .outcomes import cells_of, course, curve, estimate, late, mean_course, pull_ratio, values
from .questions import QUESTIONS, SCREENED, SCREENING, Question, Side, label, tested
from .words import ranges

MARKERS, DASHES = ("o", "s", "^", "D", "v"), ("-", "--", "-.", ":", (0, (6, 1, 1, 1, 1, 1)))
"""Variants differ in marker and dashes too, so that they can be told apart without colours."""

COLUMNS = 2
"""Plots beside each other, so that the text of a figure can be read in a page's width."""

Panel = tuple[str, str]
"""The title and the SVG element of a plot."""


@dataclass(frozen=True)
class Look:
    """How a series is drawn."""

    colour: str
    marker: str
    dashes: str | tuple

    @classmethod
    def of(cls, number: int, dashes: int | None = None) -> "Look":
        """The look of the series with this number; `dashes` may be those of another."""
        other = number if dashes is None else dashes
        return cls(LINES[number % len(LINES)], MARKERS[other], DASHES[other])


def write_figures(archive: Archive, folder: Path) -> list[Path]:
    """Write the figures of the questions that have cells into `folder`; returns their paths."""
    drawn: dict[str, Callable[[Archive, Question], list[Panel]]] = {
        "transfer": transfer,
        "lever": lever,
        "long": long,
        "few": few,
    }
    written = []
    for question in QUESTIONS:
        if panels := drawn[question.name](archive, question):
            written.append(folder / f"{question.name}.svg")
            write_text(written[-1], standalone(panels, COLUMNS))
    return written


def transfer(archive: Archive, question: Question) -> list[Panel]:
    """Accuracy on both tasks for each variant, a plot for each task that is trained."""
    cells = cells_of(archive, question)
    series = {
        role: {
            f"{of} task, {tested(role, outcome)}": {
                variant: estimate(values(cells, Side(variant), outcome, (role,)))
                for variant in question.variants
            }
            for outcome, of in (("own", "trained"), ("other", "other"))
        }
        for role in question.trained
    }
    return [
        named_ranges(f"transfer-{role}", f"Trained on {role}", found)
        for role, found in series.items()
        if any(each for by_variant in found.values() for each in by_variant.values())
    ]


def lever(archive: Archive, question: Question) -> list[Panel]:
    """What the multiple of β does, and below it the schedules at one mean β."""
    return [*_over_multiples(archive.get(SCREENING)), *_schedules(archive, question)]


def _over_multiples(cells: Archived | None) -> list[Panel]:
    """Pull, accuracies and KL over the multiple of β, with a line for each task and schedule."""
    if cells is None:
        return []

    def share(cell: Record, task: str) -> float:
        return cell.right[task]["greedy"] / cells.items[task]

    shown: list[tuple[str, str, bool, Callable[[Record], float | None]]] = [
        ("KL's pull beside the rewards'", "ratio of means", False, pull_ratio),
        ("KL at the end", "nats per token", False, lambda cell: late(cell, "kl")),
        ("Task that was trained", "accuracy", True, lambda cell: share(cell, cell.trained)),
        ("Other task", "accuracy", True, lambda cell: share(cell, tested(cell.trained, "other"))),
    ]
    roles = sorted({cell.trained for cell in cells.cells if cell.trained})
    seeds = ranges(sorted({cell.seed for cell in cells.cells}))
    panels = []
    for number, (title, unit, percent, measure) in enumerate(shown):
        lines = {
            f"{role}, {'constant' if kind == 'constant' else 'GRPO-D'}": (
                Look.of(color, style),
                _by_multiple(cells, kind, role, measure),
            )
            for color, role in enumerate(roles)
            for style, kind in enumerate(("constant", "grpo-d"))
        }
        without = {
            role: (
                Look.of(color),
                list(filter(None, map(measure, cells.of("no-kl", role).values()))),
            )
            for color, role in enumerate(roles)
        }
        if any(points for _, points in lines.values()):
            draw = _multiples(lines, without if percent else {}, unit, percent)
            element = plot_element(f"lever-{number}", f"{title} over β", draw)
            panels.append((f"{title} (seed {seeds})", element))
    return panels


def _by_multiple(
    cells: Archived, kind: str, role: str, measure: Callable[[Record], float | None]
) -> dict[float, list[float]]:
    """Multiple of β → what is measured of each seed."""
    found = {
        float(times): [measure(cell) for cell in cells.of(f"{kind}-x{times:g}", role).values()]
        for times in SCREENED
    }
    return {times: each for times, each in found.items() if each and None not in each}


def _multiples(
    lines: dict[str, tuple[Look, dict[float, list[float]]]],
    without: dict[str, tuple[Look, list[float]]],
    unit: str,
    percent: bool,
) -> Callable[[Axes], None]:
    def draw(axes: Axes) -> None:
        for name, (look, points) in lines.items():
            if not points:
                continue
            for times, seeds in points.items():
                axes.plot([times] * len(seeds), seeds, look.marker, color=look.colour,
                          markersize=3, alpha=0.45)  # fmt: skip
            means = [float(np.mean(seeds)) for seeds in points.values()]
            axes.plot(list(points), means, color=look.colour, marker=look.marker, markersize=5,
                      linestyle=look.dashes, linewidth=2, label=name)  # fmt: skip
        for role, (look, seeds) in without.items():
            if seeds:
                axes.axhline(float(np.mean(seeds)), color=look.colour, linestyle=":",
                             linewidth=1.2, label=f"{role}, β = 0")  # fmt: skip
        axes.set_xscale("log")
        axes.set_xticks(SCREENED, [f"×{times:g}" for times in SCREENED])
        axes.xaxis.set_minor_locator(NullLocator())
        axes.set(xlabel="β, in multiples of the paper's", ylabel=unit)
        if percent:
            _in_percent(axes)
        else:
            axes.set_yscale("log")
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
            axes.yaxis.set_minor_locator(NullLocator())
        axes.grid(axis="y", linewidth=0.8)

    return draw


def _schedules(archive: Archive, question: Question) -> list[Panel]:
    """Both accuracies of each schedule, with intervals over seeds."""
    cells = cells_of(archive, question)
    found = {
        name: {
            variant: estimate(values(cells, Side(variant), outcome, question.trained))
            for variant in question.variants
        }
        for name, outcome in (("task that was trained", "own"), ("other task", "other"))
    }
    return [
        named_ranges(f"schedules-{number}", f"Schedules: {name}", {name: by_variant})
        for number, (name, by_variant) in enumerate(found.items())
        if any(by_variant.values())
    ]


def long(archive: Archive, question: Question) -> list[Panel]:
    """Accuracies, β, KL and entropy over many steps, for all variants."""
    cells = cells_of(archive, question)
    if cells is None:
        return []
    (role,) = question.trained
    other = tested(role, "other")
    panels = [
        _curves("long-own", f"Trained task: {role}", cells, question, role, role),
        _curves("long-other", f"Other task: {other}", cells, question, role, other),
        _courses("Sampled answers in training", "accuracy", cells, question, "accuracy"),
        _courses("Weight of the KL", "β", cells, question, "beta"),
        _courses("KL to the start", "nats per token", cells, question, "kl"),
        _courses("Entropy", "nats per token", cells, question, "entropy"),
    ]
    return [panel for panel in panels if panel]


def few(archive: Archive, question: Question) -> list[Panel]:
    """Accuracies over steps on few items, a row for each task that is trained."""
    cells = cells_of(archive, question)
    if cells is None:
        return []
    panels = [
        _curves(
            f"few-{role}-{task}",
            f"Trained on {role}, tested on {task}",
            cells,
            question,
            role,
            task,
        )
        for role in question.trained
        for task in (role, tested(role, "other"))
    ]
    return [panel for panel in panels if panel]


Courses = dict[str, list[dict[float, float]]]
"""Variant → the course of each seed, step → value."""


def _curves(
    name: str, title: str, cells: Archived, question: Question, role: str, task: str
) -> Panel | None:
    """The learning curves of all variants on a task."""
    found = {
        variant: curve(list(cells.of(variant, role).values()), task)
        for variant in question.variants
        if variant != BASE
    }
    return _lines(name, title, "accuracy, validation", found, percent=True)


def _courses(
    title: str, unit: str, cells: Archived, question: Question, metric: str
) -> Panel | None:
    """A metric of training over its steps, of all variants that have it."""
    (role,) = question.trained
    found = {
        variant: course(list(cells.of(variant, role).values()), metric)
        for variant in question.variants
        if variant != BASE
    }
    name = f"{question.name}-{metric}"
    return _lines(name, title, unit, found, percent=metric == "accuracy")


def _lines(name: str, title: str, unit: str, found: Courses, percent: bool) -> Panel | None:
    """A thin line for each seed, and a thick one for their mean; None where there is nothing."""
    if not any(found.values()):
        return None

    def draw(axes: Axes) -> None:
        for number, (variant, seeds) in enumerate(found.items()):
            look = Look.of(number)
            for seed in seeds:
                axes.plot(list(seed), list(seed.values()), color=look.colour, linewidth=0.6,
                          alpha=0.35)  # fmt: skip
            mean = mean_course(seeds)
            if mean:
                axes.plot(list(mean), list(mean.values()), color=look.colour, linewidth=2,
                          linestyle=look.dashes, label=label(variant))  # fmt: skip
        axes.set(xlabel="step", ylabel=unit)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.set_ylim(bottom=0)
        if percent:
            _in_percent(axes)
        axes.grid(axis="y", linewidth=0.8)

    return title, plot_element(name, title, draw)


def named_ranges(name: str, title: str, found: dict[str, dict[str, Estimate | None]]) -> Panel:
    """Points with intervals in a row for each variant; names are easiest to read along a line.

    `found` is the name of a series → variant → accuracy.
    """
    variants = list(next(iter(found.values())))

    def draw(axes: Axes) -> None:
        for number, (series, by_variant) in enumerate(found.items()):
            look, shift = Look.of(number), (number - (len(found) - 1) / 2) * 0.24
            there = {at: each for at, each in enumerate(by_variant.values()) if each}
            middles = [each.value for each in there.values()]
            reaches = [(e.value - e.low, e.high - e.value) for e in there.values()]
            axes.errorbar(middles, [at + shift for at in there], xerr=np.transpose(reaches),
                          color=look.colour, marker=look.marker, linestyle="", markersize=5,
                          elinewidth=1.4, capsize=3, label=series)  # fmt: skip
        axes.set_yticks(range(len(variants)), [label(variant) for variant in variants])
        axes.set_ylim(len(variants) - 0.5, -0.5)
        axes.set_xlabel("accuracy, 95% interval over seeds")
        axes.xaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
        axes.xaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
        axes.grid(axis="x", linewidth=0.8)

    return title, plot_element(name, title, draw, height=1 + 0.3 * len(variants))


def _in_percent(axes: Axes) -> None:
    axes.yaxis.set_major_formatter(PercentFormatter(xmax=1, decimals=0))
    axes.yaxis.set_major_locator(MaxNLocator(6, steps=[1, 2, 5, 10]))
