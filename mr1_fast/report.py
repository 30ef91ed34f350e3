"""One page about a run: `python -m mr1_fast.report RUN` writes RUN/report.html from what the run has recorded so far.

The page is a single file: plots are inline SVG, images are data URIs, and its content policy forbids scripts and any
request. What models, data and settings say is hostile text, so everything passes `_text` on its way in.
"""

import argparse
import base64
import html
import io
import json
import math
import re
from dataclasses import dataclass
from pathlib import Path
from string import Template

import matplotlib
import numpy as np
import yaml
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, PercentFormatter
from PIL import Image

from .atomic import write_atomically
from .errors import UserError, exit_on_user_error

LONGEST_TEXT = 2000
"""Characters of an output that the page shows."""
IMAGE_SIDE = 448
"""Larger images are scaled down to this many pixels, so that the page stays small."""
STAGES = ("rollout", "reward", "reference", "update")
"""The parts of a step, timed as seconds_rollout and so on."""


@dataclass
class Plot:
    """A plot over steps; it appears once the first of its columns exists."""

    title: str
    unit: str
    columns: tuple[str, ...]
    percent: bool = False
    smooth: bool = True
    from_zero: bool = True


PLOTS = [
    Plot("Loss", "nats per token", ("loss",), from_zero=False),
    Plot("Reward", "mean per completion", ("reward", "accuracy", "format")),
    Plot("Accuracy", "% of completions right", ("accuracy",), percent=True),
    Plot("KL to the reference", "nats per token", ("kl",)),
    Plot("KL weight β(s)", "weight", ("beta",), smooth=False),
    Plot("Completion length", "tokens", ("completion_length",), from_zero=False),
    Plot("Entropy", "nats per token", ("entropy",)),
]

INK, GRID, LINES = "#010101", "#020202", ("#010201", "#010301", "#010401")
PAGE_COLOURS = {INK: "--ink", GRID: "--grid"} | {line: f"--line{n}" for n, line in enumerate(LINES)}
"""What the colours of a drawn SVG become: variables of the page, which differ between light and dark."""
STYLE = dict.fromkeys(("text.color", "axes.labelcolor", "xtick.color", "ytick.color"), INK)
STYLE |= dict.fromkeys(("axes.edgecolor", "grid.color"), GRID)
STYLE |= {"svg.fonttype": "none", "svg.hashsalt": "mr1_fast", "font.size": 10, "text.parse_math": False}

PAGE = Template("""<!doctype html>
<html lang="en"><head><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; style-src 'unsafe-inline'; img-src data:">
<title>$model · $about</title><style>
:root { color-scheme: light dark; --page: #f6f5f2; --card: #fff; --ink: #23262d; --soft: #666b76; --grid: #dcdde1;
  --line0: #1f6fd0; --line1: #c2570c; --line2: #0d8a6a; --good: #0b7a43; --bad: #b3261e; }
@media (prefers-color-scheme: dark) { :root { --page: #14161a; --card: #1e2127; --ink: #e7e8ea; --soft: #a0a5b0;
  --grid: #3a3f49; --line0: #6cb0ff; --line1: #ff9f5a; --line2: #4fd1a5; --good: #6fdc9f; --bad: #ff9089; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 2rem 1rem 4rem; max-width: 74rem; background: var(--page); color: var(--ink);
  font: 16px/1.5 system-ui, "Segoe UI", Roboto, "Liberation Sans", sans-serif; overflow-wrap: anywhere; }
h1 { font-size: 1.05rem; font-weight: 500; margin: 0; } h2 { font-size: 1.25rem; margin: 2.5rem 0 .75rem; }
.headline { font: 700 clamp(1.7rem, 6vw, 2.7rem)/1.15 system-ui, sans-serif; text-wrap: balance; margin: .5rem 0; }
.soft, thead th { color: var(--soft); font-size: .875rem; font-weight: 400; margin: .4rem 0; }
.card { background: var(--card); border: 1px solid var(--grid); border-radius: 12px; padding: 1rem; margin: 0; }
.grid { display: grid; gap: 1rem; grid-template-columns: repeat(auto-fill, minmax(min(100%, 20rem), 1fr)); }
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
_UNPRINTABLE = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff\ufffe\uffff]")


def write_report(run: Path) -> Path:
    """Write `run`/report.html from the run's config.yaml, metrics.jsonl and evaluation.json; returns its path.

    Only config.yaml must exist, so a run can be looked at while it goes on. UserError for a folder that is no run.
    """
    config = _read_config(run / "config.yaml")
    columns = _read_metrics(run / "metrics.jsonl")
    path = run / "evaluation.json"
    evaluation = _json_object(path.read_text(encoding="utf-8", errors="replace"), path) if path.exists() else {}
    steps, total = len(columns["step"]), _text(config.get("steps", "?"))
    sections = (
        _accuracy_section(evaluation),
        _plots_section(columns, config),
        _timing_section(columns),
        _samples_section(evaluation.get("examples") or [], run),
        _config_section(config),
    )
    page = PAGE.substitute(
        model=_text(config.get("model")),
        about=_text(f"{config.get('task')} · {str(config.get('algo')).upper()} · seed {config.get('seed')}"),
        headline=_headline(evaluation) or (f"Step {steps} of {total}" if steps else "No steps yet"),
        progress=f"{steps} of {total} training steps recorded",
        sections="\n".join(filter(None, sections)),
    )
    return _write(run / "report.html", page)


def _read_config(path: Path) -> dict:
    if not path.is_file():
        raise UserError(f"{path} does not exist: name the folder of a run.")
    try:
        config = yaml.safe_load(path.read_text(encoding="utf-8", errors="replace"))
    except (OSError, yaml.YAMLError) as error:
        raise UserError(f"{path} cannot be read ({' '.join(str(error).split())}): restore it.") from error
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no settings: name the folder of a run.")
    return config


def _read_metrics(path: Path) -> dict[str, np.ndarray]:
    """Each metric over steps, NaN where it is missing or not finite; `step` is always there."""
    text = path.read_text(encoding="utf-8", errors="replace") if path.exists() else ""
    lines = text.split("\n")[:-1]  # a line without its end is being written now, or the run was killed at it
    rows = [{"step": step, **_json_object(line, f"{path} line {step + 1}")} for step, line in enumerate(lines)]
    names = dict.fromkeys(["step", *(name for row in rows for name in row)])
    return {name: np.array([_number(row.get(name)) for row in rows]) for name in names}


def _json_object(text: str, where: object) -> dict:
    try:
        return dict(json.loads(text))
    except (ValueError, TypeError) as error:
        raise UserError(f"{where} is no JSON object: remove it.") from error


def _number(value: object) -> float:
    # Axes overflow near the largest floats, and such a value says no more than inf does.
    return float(value) if isinstance(value, int | float) and abs(value) < 1e100 else math.nan


def _text(value: object) -> str:
    """`value` as HTML text: markup shown as text, unprintable characters as visible stand-ins, cut if very long."""
    text = str(value).replace("\r\n", "\n")
    shown = _UNPRINTABLE.sub(lambda bad: chr(0x2400 + ord(bad[0])) if bad[0] < " " else "\ufffd", text[:LONGEST_TEXT])
    cut = f'<span class="soft"> … cut: {LONGEST_TEXT:,} of {len(text):,} characters shown</span>'
    return html.escape(shown) + (cut if len(text) > LONGEST_TEXT else "")


def _section(title: str, content: str, note: str = "") -> str:
    note = note and f'<p class="soft">{note}</p>'
    return f"<section><h2>{title}</h2>{note}{content}</section>"


def _headline(evaluation: dict) -> str:
    """The result in words; empty before the first evaluation."""
    scores = [f"{evaluation[when]['greedy']['accuracy']:.1%}" for when in ("before", "after") if evaluation.get(when)]
    return f"Greedy accuracy {' → '.join(scores)}{' before training' if len(scores) == 1 else ''}" if scores else ""


def _accuracy_section(evaluation: dict) -> str:
    before, after = evaluation.get("before"), evaluation.get("after")
    if not before:
        return ""
    rows = []
    for mode, result in before.items():
        cells = f"<th>{_text(mode).capitalize()}</th>{_accuracy_cell(result)}"
        if after:
            points = 100 * (after[mode]["accuracy"] - result["accuracy"])
            cells += f"{_accuracy_cell(after[mode])}<td><b>{points:+.1f}</b> points</td>".replace("<b>-", "<b>−")
        rows.append(f"<tr>{cells}</tr>")
    heads = "<th></th><th>Before</th>" + ("<th>After</th><th>Difference</th>" if after else "")
    table = f'<table class="card"><thead><tr>{heads}</tr></thead><tbody>{"".join(rows)}</tbody></table>'
    items = f"{_text(evaluation.get('task', ''))}, {_text(evaluation.get('split', ''))} items"
    waiting = "" if after else " Not yet evaluated after training."
    return _section("Accuracy on held-out items", table, f"{items}, ranges are 95% intervals.{waiting}")


def _accuracy_cell(result: dict) -> str:
    accuracy, (low, high) = result["accuracy"], result["interval"]
    bar = f'<i style="left:{low:.2%};width:{high - low:.2%}"></i><i style="left:{accuracy:.2%}"></i>'
    count = f"{_text(result['correct'])} of {_text(result['count'])}"
    return f"""<td><b>{accuracy:.1%}</b><span class="bar">{bar}</span>
<span class="soft">{100 * low:.1f}–{high:.1%}<br>{count}</span></td>"""


def _plots_section(columns: dict[str, np.ndarray], config: dict) -> str:
    plots = PLOTS if config.get("algo") == "sft" else PLOTS[1:]  # the loss of GRPO says nothing about progress
    figures = "".join(_figure(plot, columns) for plot in plots if plot.columns[0] in columns)
    window = _window(len(columns["step"]))
    note = f"Thin: each step. Thick: mean of the last {window} steps." if window else ""
    return figures and _section("Training", f'<div class="grid">{figures}</div>', note)


def _figure(plot: Plot, columns: dict[str, np.ndarray]) -> str:
    total = len(columns["step"])
    finite = {name: np.isfinite(columns[name]).sum() for name in plot.columns if name in columns}
    holes = [f"{name}: no value in {total - count} of {total} steps" for name, count in finite.items() if count < total]
    drawn = {name: columns[name] for name, count in finite.items() if count}
    svg = _draw(plot, columns["step"], drawn) if drawn else ""
    note = f'<p class="soft">{"; ".join(holes)}</p>' if holes else ""
    return f'<figure class="card"><figcaption>{plot.title}</figcaption>{svg}{note}</figure>'


def _draw(plot: Plot, steps: np.ndarray, shown: dict[str, np.ndarray]) -> str:
    """The plot as an SVG element whose colours follow the page's."""
    window, buffer = _window(len(steps)), io.StringIO()
    with matplotlib.rc_context(STYLE):
        figure = Figure(figsize=(4.8, 2.9), layout="constrained")
        axes = figure.add_subplot(xlabel="step", ylabel=plot.unit)
        for (name, values), colour, dashes in zip(shown.items(), LINES, ("-", "--", ":"), strict=False):
            if window and plot.smooth:
                axes.plot(steps, values, color=colour, linewidth=0.8, alpha=0.5)
                values = _moving_average(values, window)
            marker = "" if window else "o"  # a line alone would not show a single step
            axes.plot(steps, values, dashes, color=colour, linewidth=2, marker=marker, markersize=4, label=name)
        if len(shown) > 1:
            figure.legend(loc="outside upper left", ncols=3, frameon=False)
        if plot.percent:
            axes.yaxis.set_major_formatter(PercentFormatter(xmax=1))
        if plot.from_zero and axes.dataLim.y0 >= 0 and axes.dataLim.y1 > 0:
            axes.set_ylim(0, 1.05 * axes.dataLim.y1)
        axes.xaxis.set_major_locator(MaxNLocator(5, integer=True))
        axes.grid(axis="y", linewidth=0.8)
        axes.spines[["top", "right"]].set_visible(False)
        no_metadata = dict.fromkeys(("Date", "Creator", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=no_metadata)
    svg = buffer.getvalue()
    svg = svg[svg.index("<svg") :].replace("<svg", f'<svg role="img" aria-label="{plot.title} over steps"', 1)
    for colour, variable in PAGE_COLOURS.items():
        svg = svg.replace(colour, f"var({variable})")
    # Every plot numbers its parts alike, but an id must be unique in a page.
    return re.sub(r'(id="|url\(#|href="#)', rf"\g<1>{plot.columns[0]}-", svg)


def _window(steps: int) -> int:
    return min(100, max(5, steps // 20)) if steps > 20 else 0  # a short run shows without an average


def _moving_average(values: np.ndarray, window: int) -> np.ndarray:
    """Mean of the finite values among the last `window`; NaN where there is none."""
    finite = np.isfinite(values)
    sums = np.convolve(np.where(finite, values, 0), np.ones(window))[: len(values)]
    counts = np.convolve(finite, np.ones(window, dtype=int))[: len(values)]
    return np.divide(sums, counts, out=np.full(len(values), np.nan), where=counts > 0)


def _timing_section(columns: dict[str, np.ndarray]) -> str:
    seconds = {stage: columns.get(f"seconds_{stage}", np.array([])) for stage in STAGES}
    medians = {stage: np.nanmedian(values) for stage, values in seconds.items() if np.isfinite(values).any()}
    total = sum(medians.values())
    rows = [
        f"""<tr><th>{stage.capitalize()}</th><td>{median:.3g} s</td>
<td class="wide"><span class="bar"><i style="left:0;width:{median / total:.1%}"></i></span></td></tr>"""
        for stage, median in medians.items()
    ]
    table = f'<table class="card"><tbody>{"".join(rows)}</tbody></table>'
    return medians and _section("Time per step", table, f"Medians of the steps; together {total:.3g} s.")


def _samples_section(examples: list[dict], run: Path) -> str:
    cards = "".join(_sample(example, run) for example in examples)
    return cards and _section("Held-out items and greedy answers", f'<div class="grid">{cards}</div>')


def _sample(example: dict, run: Path) -> str:
    images = "".join(_image(run, name) for name in example["images"])
    answers = ""
    for when in ("before", "after"):
        if answer := example.get(when):
            verdict, sign = ("right", "✓") if answer["correct"] else ("wrong", "✗")
            output = _text(answer["text"]) or '<span class="soft">(empty)</span>'
            mark = f'<b class="mark {verdict}">{sign} {verdict}</b>'
            answers += f'<p class="soft">{when.capitalize()} training {mark}</p><div class="output">{output}</div>'
    return f"""<article class="card"><div class="images">{images}</div>
<p class="question">{_text(example["problem"])}</p>
<p class="soft">Right answer: <b>{_text(example["solution"])}</b></p>{answers}</article>"""


def _image(run: Path, name: str) -> str:
    """The image as a data URI, scaled down if large; a note where it cannot be shown."""
    try:
        path = (run / name).resolve()
        if not path.is_relative_to(run.resolve()):  # the page may be passed on: nothing from elsewhere gets into it
            raise ValueError("outside the run folder")
        with Image.open(path) as image:
            picture = image.convert("RGB")
    except (OSError, ValueError, SyntaxError, Image.DecompressionBombError):  # SyntaxError: Pillow, of a broken PNG
        return f'<span class="soft">image {_text(name)} cannot be shown</span>'
    picture.thumbnail((IMAGE_SIDE, IMAGE_SIDE))
    buffer = io.BytesIO()
    picture.save(buffer, "PNG")
    data = base64.b64encode(buffer.getvalue()).decode()
    return f'<img width="{picture.width}" height="{picture.height}" alt="" src="data:image/png;base64,{data}">'


def _config_section(config: dict) -> str:
    rows = "".join(f"<tr><th>{_text(name)}</th><td>{_text(value)}</td></tr>" for name, value in config.items())
    details = f"<summary>All {len(config)} settings</summary><table><tbody>{rows}</tbody></table>"
    return _section("Configuration", f'<details class="card">{details}</details>')


def _write(path: Path, page: str) -> Path:
    try:
        write_atomically(path, page)
    except OSError as error:
        raise UserError(f"{path} cannot be written ({error.strerror}): check the folder and its disk.") from error
    return path


def main() -> None:
    """`python -m mr1_fast.report RUN`."""
    parser = argparse.ArgumentParser(prog="python -m mr1_fast.report", description="Write RUN/report.html again.")
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a run")
    print(f"wrote {write_report(parser.parse_args().run)}")


if __name__ == "__main__":
    exit_on_user_error(main)
