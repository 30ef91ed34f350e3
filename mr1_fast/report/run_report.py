"""The page about a training run, from what the run has recorded so far."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import yaml
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator, PercentFormatter

from ..errors import UserError
from ..files import write_text
from .page import answer, bar, html_page, image, sample_card, section, settings_table, text
from .records import read_json_object, read_metrics
from .svg import LINES, plot_element

STAGES = ("rollout", "reward", "reference", "update")
"""The parts of a training step, whose times are the metrics seconds_rollout and so on."""


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


PLOTS = [
    Plot("Loss", "nats per token", ("loss",), from_zero=False),
    Plot("Reward", "mean per completion", ("reward", "accuracy", "format")),
    Plot("Accuracy", "% of completions right", ("accuracy",), percent=True),
    Plot("KL to the reference", "nats per token", ("kl",)),
    Plot("KL weight β(s)", "weight", ("beta",), smooth=False),
    Plot("Completion length", "tokens", ("completion_length",), from_zero=False),
    Plot("Entropy", "nats per token", ("entropy",)),
    Plot("Model FLOP utilisation", "% of peak", ("mfu_update", "mfu_reference"), percent=True),
    Plot("Model FLOP per second", "TFLOP/s", ("tflops_update", "tflops_reference")),
]


def write_report(run: Path) -> Path:
    """Write `run`/report.html from the run's files, and return its path.

    The files are config.yaml, metrics.jsonl and evaluation.json. Only the first must exist, so a
    run can be looked at while it goes on. Raises UserError for a folder that holds no run, for a
    damaged file, and where the page cannot be written.
    """
    config = _read_config(run / "config.yaml")
    columns = read_metrics(run / "metrics.jsonl")
    path = run / "evaluation.json"
    evaluation = read_json_object(path) if path.exists() else {}

    steps, total = len(columns["step"]), text(config.get("steps", "?"))
    algo, seed = str(config.get("algo")).upper(), config.get("seed")
    sections = (
        _accuracy_section(evaluation),
        _plots_section(columns, config),
        _timing_section(columns),
        _samples_section(evaluation.get("examples") or [], run),
        section("Configuration", settings_table(config)),
    )
    page = html_page(
        model=text(config.get("model")),
        about=text(f"{config.get('task')} · {algo} · seed {seed}"),
        headline=_headline(evaluation) or (f"Step {steps} of {total}" if steps else "No steps yet"),
        progress=f"{steps} of {total} training steps recorded",
        sections="\n".join(filter(None, sections)),
    )
    write_text(run / "report.html", page, way_out="check the folder and its disk")
    return run / "report.html"


def _read_config(path: Path) -> dict:
    if not path.is_file():
        raise UserError(f"{path} does not exist: name the folder of a run.")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, yaml.YAMLError) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} cannot be read ({reason}): restore it.") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no settings: name the folder of a run.")
    return config


def _headline(evaluation: dict) -> str:
    """The result in words; empty before the first evaluation."""
    scores = [
        f"{evaluation[when]['greedy']['accuracy']:.1%}"
        for when in ("before", "after")
        if evaluation.get(when)
    ]
    if not scores:
        return ""
    return f"Greedy accuracy {' → '.join(scores)}{' before training' if len(scores) == 1 else ''}"


def _accuracy_section(evaluation: dict) -> str:
    before, after = evaluation.get("before"), evaluation.get("after")
    if not before:
        return ""

    rows = []
    for mode, result in before.items():
        cells = f"<th>{text(mode).capitalize()}</th>{_accuracy_cell(result)}"
        if after and mode in after:
            points = f"{100 * (after[mode]['accuracy'] - result['accuracy']):+.1f}"
            cells += _accuracy_cell(after[mode])
            cells += f"<td><b>{points.replace('-', '−')}</b> points</td>"
        rows.append(f"<tr>{cells}</tr>")

    heads = "<th></th><th>Before</th>" + ("<th>After</th><th>Difference</th>" if after else "")
    head, body = f"<thead><tr>{heads}</tr></thead>", f"<tbody>{''.join(rows)}</tbody>"
    items = f"{text(evaluation.get('task', ''))}, {text(evaluation.get('split', ''))} items"
    if judge := evaluation.get("judge"):
        items += f", judge: {text(judge)}"
    waiting = "" if after else " Not yet evaluated after training."
    return section(
        "Accuracy on held-out items",
        f'<table class="card">{head}{body}</table>',
        f"{items}, ranges are 95% intervals.{waiting}",
    )


def _accuracy_cell(result: dict) -> str:
    accuracy, (low, high) = result["accuracy"], result["interval"]
    count = f"{text(result['correct'])} of {text(result['count'])}"
    return f"""<td><b>{accuracy:.1%}</b>{bar(accuracy, low, high)}
<span class="soft">{100 * low:.1f}–{high:.1%}<br>{count}</span></td>"""


def _plots_section(columns: dict[str, np.ndarray], config: dict) -> str:
    # The loss of GRPO says nothing about progress.
    plots = PLOTS if config.get("algo") == "sft" else PLOTS[1:]
    figures = "".join(_figure(plot, columns) for plot in plots if plot.columns[0] in columns)
    window = _window(len(columns["step"]))
    note = f"Thin: each step. Thick: mean of the last {window} steps." if window else ""
    return figures and section("Training", f'<div class="grid">{figures}</div>', note)


def _figure(plot: Plot, columns: dict[str, np.ndarray]) -> str:
    """A plot with its title, and a note on steps without a value."""
    total = len(columns["step"])
    finite = {name: np.isfinite(columns[name]).sum() for name in plot.columns if name in columns}
    holes = [
        f"{name}: no value in {total - count} of {total} steps"
        for name, count in finite.items()
        if count < total
    ]
    shown = {name: columns[name] for name, count in finite.items() if count}
    svg = _render(plot, columns["step"], shown) if shown else ""
    note = f'<p class="soft">{"; ".join(holes)}</p>' if holes else ""
    return f'<figure class="card"><figcaption>{plot.title}</figcaption>{svg}{note}</figure>'


def _render(plot: Plot, steps: np.ndarray, shown: dict[str, np.ndarray]) -> str:
    """The plot of the columns `shown` as an SVG element."""
    window = _window(len(steps))
    marker = "" if window else "o"  # a line alone would not show a single step

    def draw(axes: Axes) -> None:
        looks = zip(LINES, ("-", "--", ":"), strict=False)
        for (name, values), (colour, dashes) in zip(shown.items(), looks, strict=False):
            if window and plot.smooth:
                axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.5)
                values = _moving_average(values, window)
            line = {"color": colour, "linewidth": 2, "marker": marker, "markersize": 4}
            axes.plot(steps, values, dashes, **line, label=name)
        axes.set(xlabel="step", ylabel=plot.unit)
        if plot.percent:
            axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
        if plot.from_zero and axes.dataLim.y0 >= 0 and axes.dataLim.y1 > 0:
            axes.set_ylim(0, 1.05 * axes.dataLim.y1)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(axis="y", linewidth=0.8)

    return plot_element(plot.columns[0], f"{plot.title} over steps", draw)


def _window(steps: int) -> int:
    """Steps that a moving average covers; 0 for a short run, which is shown without one."""
    return min(100, max(5, steps // 20)) if steps > 20 else 0


def _moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """The mean of the finite values among the last `window`; NaN where there is none."""
    finite = np.isfinite(values)
    sums = np.convolve(np.where(finite, values, 0), np.ones(window))[: len(values)]
    counts = np.convolve(finite, np.ones(window, dtype=int))[: len(values)]
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)


def _timing_section(columns: dict[str, np.ndarray]) -> str:
    seconds = {stage: columns.get(f"seconds_{stage}", np.array([])) for stage in STAGES}
    medians = {
        stage: np.nanmedian(values)
        for stage, values in seconds.items()
        if np.isfinite(values).any()
    }
    if not medians:
        return ""
    total = sum(medians.values())
    rows = [
        f"""<tr><th>{stage.capitalize()}</th><td>{median:.3g} s</td>
<td class="wide"><span class="bar"><i style="left:0;width:{median / total:.1%}"></i></span></td>\
</tr>"""
        for stage, median in medians.items()
    ]
    table = f'<table class="card"><tbody>{"".join(rows)}</tbody></table>'
    return section("Time per step", table, f"Medians of the steps; together {total:.3g} s.")


def _samples_section(examples: list[dict], run: Path) -> str:
    cards = "".join(_sample(example, run) for example in examples)
    title = "Held-out items and greedy answers"
    return cards and section(title, f'<div class="grid">{cards}</div>')


def _sample(example: dict, run: Path) -> str:
    """A card with an item and the answers before and after training, as far as there are any."""
    images = "".join(image(run, name) for name in example["images"])
    given = {when: example[when] for when in ("before", "after") if example.get(when)}
    answers = [
        answer(f"{when.capitalize()} training", each["text"], each["correct"], each.get("why", ""))
        for when, each in given.items()
    ]
    return sample_card(images, example["problem"], example["solution"], "".join(answers))
