"""The plots of a run's metrics over its steps, each no larger than what a screen can show."""

from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from .page import text
from .svg import LINES, plot_element

BINS = 250
"""Bins of a long curve. A plot is about twice as many pixels wide, and a bin keeps two points."""
MOST_EVALUATIONS = 200
"""Evaluations that are drawn with their intervals; of more, evenly spaced ones."""

FEW = 6
"""Different rewards up to which each has a bar of its own."""


@dataclass
class Plot:
    """A plot of metrics over training steps; it appears once the first of its columns exists."""

    title: str
    unit: str
    """The label of the y axis."""
    columns: tuple[str, ...]
    """The metrics that are drawn, by their names in metrics.jsonl."""
    percent: bool = False
    """Whether the values are shares, shown in percent."""
    smooth: bool = True
    """Whether a long run gets a moving average beside the values of the steps."""
    from_zero: bool = True
    """Whether the y axis begins at 0 if no value is negative."""


LENGTHS = ("completion_length", *(f"completion_length_p{share}" for share in (10, 50, 90)))
MEMORY = tuple(f"peak_gib_{stage}" for stage in ("update", "rollout", "reference", "reward"))

LEGEND = dict(zip(LENGTHS, ("mean", "10%", "median", "90%"), strict=True))
LEGEND |= {name: name.removeprefix("peak_gib_") for name in MEMORY}
"""What a legend calls metrics whose names are long; others are called as in metrics.jsonl."""

PLOTS = [
    Plot("Loss", "nats per token", ("loss",), from_zero=False),
    Plot("Reward", "mean per completion", ("reward", "accuracy", "format")),
    Plot("Accuracy", "% of completions right", ("accuracy",), percent=True),
    Plot("KL to the reference", "nats per token", ("kl",)),
    Plot("KL weight β(s)", "weight", ("beta",), smooth=False),
    Plot("Pull of the KL and of the rewards", "mean per token", ("kl_pull", "reward_pull")),
    Plot("Completion length", "tokens", LENGTHS, from_zero=False),
    Plot("Entropy", "nats per token", ("entropy",)),
    Plot("Model FLOP utilisation", "% of peak", ("mfu_update", "mfu_reference"), percent=True),
    Plot("Model FLOP per second", "TFLOP/s", ("tflops_update", "tflops_reference")),
    Plot("Peak memory", "GiB", MEMORY, smooth=False),
]


def plots_of(config: dict) -> list[Plot]:
    """The plots of a run with these settings; each extra reward has one of its own.

    Rewards differ in scale, so a common axis would show the largest alone.
    """
    # The loss of GRPO says nothing about progress.
    plots = PLOTS if config.get("algo") == "sft" else PLOTS[1:]
    extra = config.get("extra_rewards")
    names = [str(name) for name in extra] if isinstance(extra, dict) else []
    rewards = [
        Plot(f"Reward {name}", "mean per completion", (name,), from_zero=False) for name in names
    ]
    return [*plots[:2], *rewards, *plots[2:]]


def figure(plot: Plot, columns: dict[str, np.ndarray], number: int) -> str:
    """A plot with its title, and a note on steps without a value; `number` is its own in a page."""
    total = len(columns["step"])
    finite = {name: np.isfinite(columns[name]).sum() for name in plot.columns if name in columns}
    holes = [
        f"{name}: no value in {total - count} of {total} steps"
        for name, count in finite.items()
        if count < total
    ]
    shown = {name: columns[name] for name, count in finite.items() if count}
    svg = _render(plot, columns["step"], shown, number) if shown else ""
    note = f'<p class="soft">{text("; ".join(holes))}</p>' if holes else ""
    return _card(text(plot.title), svg + note)


def evaluation_figure(evaluations: dict[str, np.ndarray]) -> str:
    """The accuracy of the evaluations during training, each with its interval; "" for none."""
    known = np.flatnonzero(np.isfinite(evaluations["accuracy"]))
    if not len(known):
        return ""
    if len(known) > MOST_EVALUATIONS:
        known = known[np.linspace(0, len(known) - 1, MOST_EVALUATIONS).astype(int)]
    steps, accuracy, low, high = (
        evaluations[name][known] for name in ("step", "accuracy", "low", "high")
    )

    def draw(axes: Axes) -> None:
        axes.vlines(steps, low, high, color=LINES[0], linewidth=1.2, alpha=0.5)
        axes.plot(steps, accuracy, color=LINES[0], linewidth=2, marker="o", markersize=4)
        axes.set(xlabel="step", ylabel="% of held-out items right")
        axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
        _finish(axes)

    svg = plot_element("evaluations", "Held-out accuracy over steps", draw)
    note = '<p class="soft">Greedy answers; lines are 95% intervals.</p>'
    return _card("Held-out accuracy", svg + note)


def histogram(values: np.ndarray) -> str:
    """How often each reward of the last step was given, as a plot; `values` are finite, (n,)."""
    distinct, counts = np.unique(values, return_counts=True)

    def draw(axes: Axes) -> None:
        if len(distinct) <= FEW:
            axes.bar([f"{value:.3g}" for value in distinct], counts, 0.6, color=LINES[0], alpha=0.7)
        else:
            axes.hist(values, bins=20, color=LINES[0], alpha=0.7)
        axes.set(xlabel="reward", ylabel="completions")
        axes.yaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(axis="y", linewidth=0.8)
        axes.set_axisbelow(True)

    return _card(
        "Rewards of the last step", plot_element("rewards-of-step", "Rewards, counted", draw)
    )


def window_of(steps: int) -> int:
    """Steps that a moving average covers; 0 for a short run, which is shown without one."""
    return min(100, max(5, steps // 20)) if steps > 20 else 0


def thinned(steps: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The points of a curve that a screen can tell apart: the lowest and highest of each bin.

    Both arrays are (n,); at most 2·BINS points are left, in the order of the steps, and every spike
    is among them. A bin without a finite value leaves a gap.
    """
    if len(values) <= 2 * BINS:
        return steps, values
    width = -(-len(values) // BINS)
    padded = np.full(BINS * width, np.nan)
    padded[: len(values)] = values
    bins = padded.reshape(BINS, width)
    finite = np.isfinite(bins)
    lowest = np.where(finite, bins, np.inf).argmin(axis=1)
    highest = np.where(finite, bins, -np.inf).argmax(axis=1)
    kept = np.sort(np.stack([lowest, highest], axis=1), axis=1) + width * np.arange(BINS)[:, None]
    kept = np.unique(kept[kept < len(values)])
    return steps[kept], values[kept]


def _render(plot: Plot, steps: np.ndarray, shown: dict[str, np.ndarray], number: int) -> str:
    """The plot of the columns `shown` as an SVG element."""
    window = window_of(len(steps))
    marker = "" if window else "o"  # a line alone would not show a single step

    def draw(axes: Axes) -> None:
        looks = zip(LINES, ("-", "--", ":", "-."), strict=False)
        for (name, values), (colour, dashes) in zip(shown.items(), looks, strict=False):
            if window and plot.smooth:
                axes.plot(*thinned(steps, values), color=colour, linewidth=0.8, alpha=0.5)
                values = _moving_average(values, window)
            line = {"color": colour, "linewidth": 2, "marker": marker, "markersize": 4}
            axes.plot(*thinned(steps, values), dashes, **line, label=LEGEND.get(name, name))
        axes.set(xlabel="step", ylabel=plot.unit)
        if plot.percent:
            axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
        if plot.from_zero and axes.dataLim.y0 >= 0 and axes.dataLim.y1 > 0:
            axes.set_ylim(0, 1.05 * axes.dataLim.y1)
        _finish(axes)

    # Names of rewards may be anything, so the number keeps the plots' ids apart.
    return plot_element(f"plot{number}", f"{plot.title} over steps", draw)


def _finish(axes: Axes) -> None:
    axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
    axes.grid(axis="y", linewidth=0.8)


def _card(title: str, content: str) -> str:
    return f'<figure class="card"><figcaption>{title}</figcaption>{content}</figure>'


def _moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of the finite values among the last `window`; NaN where there is none."""
    finite = np.isfinite(values)
    sums = np.convolve(np.where(finite, values, 0), np.ones(window))[: len(values)]
    counts = np.convolve(finite, np.ones(window, dtype=int))[: len(values)]
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)
