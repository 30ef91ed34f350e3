"""The sections of a run's page: accuracy, speed, plots, the last step, samples."""

from pathlib import Path

import numpy as np

from .page import answer, bar, image, sample_card, section, text, tile
from .plots import evaluation_figure, figure, histogram, plots_of, window_of

STAGES = ("rollout", "reward", "reference", "update")
"""The parts of a training step, whose times are the metrics seconds_rollout and so on."""
RECENT = 50
"""Steps whose median says how fast a run is now."""
MOST_SKIPPED = 20
"""Skipped steps that are listed one by one."""


def about(config: dict) -> str:
    """What a run is, for the title of its pages, as HTML."""
    algo, seed = str(config.get("algo")).upper(), config.get("seed")
    return text(f"{config.get('task')} · {algo} · seed {seed}")


# --- accuracy -----------------------------------------------------------------------------------


def headline(evaluation: dict) -> str:
    """The result in words; empty before the first evaluation."""
    scores = [
        f"{evaluation[when]['greedy']['accuracy']:.1%}"
        for when in ("before", "after")
        if evaluation.get(when)
    ]
    if not scores:
        return ""
    return f"Greedy accuracy {' → '.join(scores)}{' before training' if len(scores) == 1 else ''}"


def accuracy_section(evaluation: dict) -> str:
    """The table of accuracy before and after training."""
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
    if after and "final_step" in evaluation:
        waiting = f" The final model is that after step {text(evaluation['final_step'])}."
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


# --- speed --------------------------------------------------------------------------------------


def speed_tiles(
    columns: dict[str, np.ndarray], evaluations: dict[str, np.ndarray], config: dict, live: bool
) -> str:
    """Cards with speed, use of the device and memory, and for a live page the time left."""
    seconds = _recent(_step_seconds(columns))
    if not seconds:
        return ""
    tiles = []
    steps = len(columns["step"])
    if live and (left := _seconds_left(steps, seconds, evaluations, config)) is not None:
        of = f"{steps:,} of {config['steps']:,} steps done"
        tiles.append(tile("Time left, about", duration(left), note=of))
    per_step = f"{seconds:.3g} s a step"
    tiles.append(tile("Speed", _short(60 / seconds), "steps/min", per_step))

    sizes = (config.get("prompts_per_step"), config.get("num_generations"))
    if (length := _recent(columns.get("completion_length"))) and all(
        isinstance(size, int) for size in sizes
    ):
        tokens = length * sizes[0] * sizes[1]
        note = f"{tokens:,.0f} sampled a step"
        tiles.append(tile("Tokens", _short(tokens / seconds), "tokens/s", note))
    if mfu := _recent(columns.get("mfu_update")):
        tiles.append(tile("MFU", f"{mfu:.0%}", note="of peak, in the update"))
    if peaks := _peaks(columns):
        stage = max(peaks, key=peaks.get)
        tiles.append(tile("Peak memory", f"{peaks[stage]:.1f}", "GiB", f"in the {text(stage)}"))
    note = f"Medians of the last {min(RECENT, steps)} steps."
    return f'<div class="grid tiles">{"".join(tiles)}</div><p class="soft">{note}</p>'


def duration(seconds: float) -> str:
    """A time in the two units that matter: `40 s`, `12 min`, `3 h 20 min`, `2 d 4 h`."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 90:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 36:
        return f"{hours} h {minutes} min"
    days, hours = divmod(hours, 24)
    return f"{days} d {hours} h"


def _step_seconds(columns: dict[str, np.ndarray]) -> np.ndarray | None:
    """The seconds of each step: the sum over its stages, (steps,), in which the slowest process
    has not waited."""
    stages = [
        values
        for name, values in columns.items()
        if name.startswith("seconds_") and name != "seconds_wait"
    ]
    return np.nansum(stages, axis=0) if stages else None


def _seconds_left(
    steps: int, seconds: float, evaluations: dict[str, np.ndarray], config: dict
) -> float | None:
    """Estimate the time of the steps and evaluations that are still to come."""
    total, every = config.get("steps"), config.get("eval_every")
    if not isinstance(total, int):
        return None
    left = max(0, total - steps) * seconds
    each = _recent(evaluations["seconds"])
    if each and isinstance(every, int) and every > 0:
        left += each * (total // every - steps // every)
    return left


def _peaks(columns: dict[str, np.ndarray]) -> dict[str, float]:
    """The largest memory use of each stage so far, in GiB."""
    return {
        name.removeprefix("peak_gib_"): float(np.nanmax(values))
        for name, values in columns.items()
        if name.startswith("peak_gib_") and np.isfinite(values).any()
    }


def _recent(values: np.ndarray | None) -> float:
    """The median of the last RECENT values; 0 where none is finite."""
    known = np.array([]) if values is None else values[-RECENT:]
    known = known[np.isfinite(known)]
    return float(np.median(known)) if len(known) else 0.0


def _short(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def timing_section(columns: dict[str, np.ndarray]) -> str:
    """The median time of each stage of a step."""
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
    note = f"Medians of the steps; together {total:.3g} s."
    if waited := _recent(columns.get("seconds_wait")):
        note += f" A process waits {waited:.3g} s of it for the slowest one's rollout."
    return section("Time per step", table, note)


# --- plots --------------------------------------------------------------------------------------


def plots_section(
    columns: dict[str, np.ndarray], evaluations: dict[str, np.ndarray], config: dict
) -> str:
    """The plots of the metrics over the steps, and of the evaluations on the way."""
    figures = evaluation_figure(evaluations) + "".join(
        figure(plot, columns, number)
        for number, plot in enumerate(plots_of(config))
        if plot.columns[0] in columns
    )
    window = window_of(len(columns["step"]))
    notes = [f"Thin: each step. Thick: mean of the last {window} steps." if window else ""]
    notes.append(_skipped(columns))
    note = " ".join(filter(None, notes))
    return figures and section("Training", f'<div class="grid">{figures}</div>', note)


def _skipped(columns: dict[str, np.ndarray]) -> str:
    """A sentence on the steps that changed no weight; "" for none."""
    steps = columns["step"]
    skipped = steps[columns.get("skipped", np.zeros(len(steps))) > 0]
    if not len(skipped):
        return ""
    listed = ", ".join(f"{step:.0f}" for step in skipped[:MOST_SKIPPED])
    more = " and others" if len(skipped) > MOST_SKIPPED else ""
    return (
        f"{len(skipped)} of {len(steps)} steps changed no weight, as their gradient was not finite "
        f"or no completion counted: {listed}{more}."
    )


# --- completions and samples --------------------------------------------------------------------


def last_step_section(records: list[dict], link: str) -> str:
    """The rewards of a step's completions, the best and the worst one; `link` is HTML."""
    given = [
        (each["reward"], record, each)
        for record in records
        for each in record.get("completions") or []
        if isinstance(each, dict) and isinstance(each.get("reward"), int | float)
    ]
    rewards = np.array([reward for reward, _, _ in given], dtype=float)
    if not np.isfinite(rewards).all() or not len(rewards):
        return link and section("Completions", "", link)

    cards = [histogram(rewards)]
    shown = {"Highest reward": rewards.argmax(), "Lowest reward": rewards.argmin()}
    if rewards.min() == rewards.max():
        shown = {"All completions have the same reward; the first": 0}
    for label, index in shown.items():
        _, record, completion = given[index]
        words = f"{label}, {_rewards(completion)}:"
        right = completion.get("accuracy")
        right = None if right is None else bool(right)
        said = answer(words, completion.get("text", ""), right, completion.get("why", ""))
        cards.append(sample_card("", record.get("problem", ""), record.get("solution", ""), said))
    step = text(records[0].get("step"))
    return section(f"Completions of step {step}", f'<div class="grid">{"".join(cards)}</div>', link)


def _rewards(completion: dict) -> str:
    """The rewards of a completion and how it ended, as HTML."""
    named = [
        f"{name} {value:.3g}"
        for name, value in completion.items()
        if isinstance(value, int | float)
    ]
    ended = completion.get("reason")
    return text(" · ".join([*named, *([f"ended by {ended}"] if ended else [])]))


def samples_section(examples: list[dict], run: Path) -> str:
    """Held-out items with their images, and the greedy answers before and after training."""
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
