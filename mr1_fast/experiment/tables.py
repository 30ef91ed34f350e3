"""The tables of an experiment as plain data, and its result in words."""

from collections.abc import Iterable
from dataclasses import dataclass, field
from itertools import chain, combinations

import numpy as np

from ..evaluate.judges import NAMES
from . import paper
from .results import BASE, Results, common
from .statistics import Comparison, Estimate, accuracy, compare, holm

COMPARED = (
    ("grpo-d", "grpo"),
    ("grpo-d", "sft-answer"),
    ("grpo-d", "sft-solution"),
    ("grpo-d", "sft"),
    ("grpo", "sft-answer"),
    ("grpo", "sft"),
)
"""Pairs of methods that are tested against each other; `sft` is that of earlier versions."""

MISSING = "—"
"""What a cell of a table shows where there is no value."""


@dataclass
class Value:
    """A cell of a table: a number, what belongs to it, and a bar if it is an accuracy."""

    main: str
    detail: str = ""
    bar: Estimate | None = None


@dataclass
class Table:
    """A table of plain text and values."""

    title: str
    head: list[str]
    rows: list[list[str | Value]] = field(default_factory=list)
    note: str = ""


def percent(share: float) -> str:
    """A share in percent, with one decimal."""
    return f"{100 * share:.1f}%"


def signed(number: float, unit: str = "") -> str:
    """A number with its sign and one decimal."""
    return f"{_tenths(number):+.1f}{unit}".replace("-", "−")


def interval(estimate: Estimate) -> str:
    """An interval of shares, in points."""
    low, high = (_tenths(100 * end) for end in (estimate.low, estimate.high))
    return f"[{low:.1f}, {high:.1f}]".replace("-", "−")


def p_value(p: float) -> str:
    """A p value with three decimals."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}"


def _tenths(number: float) -> float:
    """A number to one decimal; what rounds to nothing has no sign."""
    return round(number, 1) + 0.0


def main_tables(results: Results, mode: str) -> list[Table]:
    """The tables that hold the result, for the answers of one mode.

    For a comparison of methods they are the paper's tables and the paired tests; for another study,
    the accuracies of its variants.
    """
    if results.about["axis"]["name"] == "method":
        tables = [same_task(results, mode), cross_task(results, mode), paired(results, mode)]
    else:
        tables = [by_variant(results, trained, mode) for trained in results.about["trained"]]
    return [table for table in tables if table.rows and len(table.head) > 1]


def same_task(results: Results, mode: str) -> Table:
    """Accuracies on the trained task, in the paper's layout and beside its numbers."""
    published = paper.ACCURACY.get(results.about.get("paper"), {}) if mode == "greedy" else {}
    table = Table(f"Same task, {mode}", ["Model"])
    pairs = results.pairs(same=True)
    for task, _ in pairs:
        table.head += [_judged(results, _role(task), task, judge) for judge in results.judges(task)]
        table.head += ["the paper's"] if published else []
    for variant in _in_papers_order(results):
        row: list[str | Value] = [_row_name(results, variant)]
        for task, other in pairs:
            for judge in results.judges(task):
                row.append(_accuracy(results, variant, (task, other), mode, judge))
            if published:
                row.append(_published(published.get(paper.method(variant), {}).get(task)))
        table.rows.append(row)
    return table


def cross_task(results: Results, mode: str) -> Table:
    """Accuracies on the task that was not trained, with relative changes as in the paper."""
    published = paper.CROSS_TASK.get(results.about.get("paper"), {}) if mode == "greedy" else {}
    table = Table(
        f"Other task, {mode}",
        ["Model"],
        note="Changes are relative, between mean accuracies of the same seeds.",
    )
    others = [other for other in (BASE, *paper.SFT) if other in (BASE, *results.methods)]
    to_others = ["to base" if other == BASE else f"to {results.label(other)}" for other in others]
    columns = [
        (pair, judge) for pair in results.pairs(same=False) for judge in results.judges(pair[1])
    ]
    for (trained, tested), judge in columns:
        title = f"{_role(trained)} → {_role(tested)}"
        table.head += [_judged(results, title, tested, judge), *to_others]
    for variant in _in_papers_order(results):
        row: list[str | Value] = [_row_name(results, variant)]
        for pair, judge in columns:
            row.append(_accuracy(results, variant, pair, mode, judge))
            is_papers = judge == paper.JUDGE or len(results.judges(pair[1])) == 1
            reported = published.get(pair, {}) if is_papers else {}
            for other in others:
                change = reported.get(paper.method(variant), {}).get(paper.method(other))
                row.append(
                    MISSING
                    if variant in (BASE, other)
                    else _change(results, (variant, other), pair, mode, judge, change)
                )
        table.rows.append(row)
    return table


def paired(results: Results, mode: str) -> Table:
    """Tests of the methods against each other: differences, and p values over seeds and items."""
    pairs = results.pairs(same=True) + results.pairs(same=False)
    names, found = [], []
    for pair in pairs:
        for first, second in COMPARED:
            ours, theirs = common(results.runs(first, pair, mode), results.runs(second, pair, mode))
            if ours:
                names.append(
                    [" → ".join(pair), f"{results.label(first)} − {results.label(second)}"]
                )
                found.append(compare(ours, theirs))
    over_seeds = [comparison.p_seeds for comparison in found]
    over_items = [comparison.p_items for comparison in found]
    cells = zip(map(_difference, found), _p_values(over_seeds), _p_values(over_items), strict=True)
    return Table(
        f"Paired tests, {mode}",
        ["Trained → tested", "Methods", "Points", "p over seeds", "p over items"],
        [[*name, *row] for name, row in zip(names, cells, strict=True)],
        note=f"{len(found)} comparisons: p values are uncorrected, and beside each stands Holm's "
        "correction for the number of values in its column. Over seeds, a paired t-test asks about "
        "the methods: would new training runs say the same? Over items, an exact sign test "
        "(McNemar's, if there is one seed) asks about these trained models only. Intervals are "
        "over seeds, or over the items of the first seed where all seeds have the same difference.",
    )


def by_variant(results: Results, trained: str, mode: str) -> Table:
    """Accuracies of each variant on each task, after training on one."""
    columns = _task_columns(results)
    titles = [_judged(results, _role(task), task, judge) for task, judge in columns]
    table = Table(f"Trained on {trained}, {mode}", [results.about["axis"]["label"], *titles])
    for variant in [BASE, *results.methods]:
        values = [
            _accuracy(results, variant, (trained, tested), mode, judge) for tested, judge in columns
        ]
        table.rows.append([results.label(variant), *values])
    return table


def cells(results: Results) -> Table:
    """All cells: state, greedy accuracies, time and memory."""
    columns = _task_columns(results)
    titles = [_judged(results, _role(task), task, judge) for task, judge in columns]
    head = ["Cell", "State", *titles, "Training", "Evaluation", "Peak memory"]
    table = Table("Greedy accuracy, time and memory", head)
    for cell in results.cells:
        name = " · ".join(
            filter(None, [results.label(cell.variant), cell.trained, f"seed {cell.seed}"])
        )
        row: list[str | Value] = [name, Value(cell.state, cell.error)] + [MISSING] * (len(head) - 2)
        if cell.correct:
            found = [results.verdicts(cell, task, judge) for task, judge in columns]
            row[2:] = [percent(modes["greedy"].mean()) if modes else MISSING for modes in found]
            row += [f"{cell.seconds[part]:.0f} s" for part in ("train", "evaluate")]
            row += [f"{cell.peak_memory / 2**30:.2f} GiB" if cell.peak_memory else MISSING]
        table.rows.append(row)
    minutes = sum(sum(cell.seconds.values()) for cell in results.cells) / 60
    table.note = (
        f"{minutes:.1f} minutes together. The training of a base model is its supervised start, if "
        "it has one."
    )
    return table


def headline(results: Results) -> tuple[str, list[str]]:
    """The result in one line, and lines with the numbers behind it.

    While there is no result, the line says how many cells are finished.
    """
    findings = [("Same task", results.pairs(same=True)), ("Other task", results.pairs(same=False))]
    said = [
        (title, *standing)
        for title, pairs in findings
        if pairs and (standing := _standing(results, pairs))
    ]
    finished = sum(cell.state == "finished" for cell in results.cells)
    progress = f"{finished} of {len(results.cells)} cells finished"
    if not said:
        return progress.capitalize(), []
    first = " ".join(f"{title}: {verdict}." for title, verdict, _ in said)
    details = [f"{title}, {numbers}" for title, _, numbers in said]
    return first, [*details, f"{progress}."]


def _standing(results: Results, pairs: list[tuple[str, str]]) -> tuple[str, str] | None:
    """A verdict on who leads in greedy accuracy over all pairs, and the numbers behind it.

    p values are corrected for the comparisons of all variants with each other, since the leader was
    not known beforehand. Returns None while there are no two variants to compare.
    """
    runs = {variant: _joined(results, variant, pairs) for variant in (BASE, *results.methods)}
    runs = {variant: found for variant, found in runs.items() if found}
    shared = dict(zip(runs, common(*runs.values()), strict=True)) if runs else {}
    if len(shared) < 2 or not all(shared.values()):
        return None
    means = {variant: float(np.mean(found)) for variant, found in shared.items()}
    leader, *others = sorted(means, key=means.get, reverse=True)
    found = [
        compare(shared[first], shared[second])
        for first, second in combinations((leader, *others), 2)
    ]

    # The leader comes first, so the first comparisons are those of the leader with the others.
    p_values = holm([_p(comparison) for comparison in found])[: len(others)]
    near = [other for other, p in zip(others, p_values, strict=True) if p >= 0.05]
    if len(near) == len(others):
        verdict = "no lead beyond noise"
    else:
        within = f"{len(near)} others" if len(near) > 2 else " and ".join(map(results.label, near))
        verdict = f"{results.label(leader)} leads{within and f', but within noise of {within}'}"
    seeds = len(shared[leader])
    verdict += " (one seed)" if seeds == 1 else ""

    where = " and ".join(" → ".join(pair) for pair in pairs) + " together" * (len(pairs) > 1)
    ranks = ", ".join(
        f"{results.label(variant)} {percent(means[variant])}" for variant in (leader, *others)
    )
    gap, p = _difference(found[0]), p_value(p_values[0])
    lead = f"{results.label(leader)} − {results.label(others[0])}: {gap.main} points {gap.detail}"
    scope = f"over {seeds} seeds" if found[0].p_seeds is not None else "over items"
    scope += f" (Holm, {len(found)} comparisons)"
    return verdict, f"{where}: {ranks}. {lead}, p {p if p.startswith('<') else f'= {p}'} {scope}."


def _joined(results: Results, variant: str, pairs: list[tuple[str, str]]) -> dict[int, np.ndarray]:
    """The runs of all pairs put together, for the seeds that have all of them."""
    runs = [results.runs(variant, pair, "greedy") for pair in pairs]
    seeds = set.intersection(*(set(each) for each in runs))
    return {seed: np.concatenate([each[seed] for each in runs]) for seed in seeds}


def _accuracy(
    results: Results, variant: str, pair: tuple[str, str], mode: str, judge: str
) -> str | Value:
    """The accuracy of a variant with its interval; it says so if seeds are missing."""
    runs, seeds = results.runs(variant, pair, mode, judge), len(results.about["seeds"])
    if not runs:
        return MISSING
    estimate = accuracy(list(runs.values()))
    partly = f", {len(runs)} of {seeds} seeds" if len(runs) < seeds else ""
    return Value(percent(estimate.value), interval(estimate) + partly, estimate)


def _change(
    results: Results,
    variants: tuple[str, str],
    pair: tuple[str, str],
    mode: str,
    judge: str,
    reported: float | None,
) -> Value:
    """The relative change of the first variant from the second, with that of the paper."""
    ours, theirs = common(*(results.runs(variant, pair, mode, judge) for variant in variants))
    detail = ""
    if reported is not None:
        detail = f"paper\N{NO-BREAK SPACE}{reported:+.2f}%".replace("-", "−")
    if not ours or not np.any(theirs):  # no change is relative to nothing
        return Value(MISSING, detail)
    return Value(signed(100 * (np.mean(ours) / np.mean(theirs) - 1), "%"), detail)


def _difference(comparison: Comparison) -> Value:
    difference = comparison.difference
    return Value(signed(100 * difference.value), interval(difference))


def _p(comparison: Comparison) -> float:
    return comparison.p_items if comparison.p_seeds is None else comparison.p_seeds


def _p_values(values: list[float | None]) -> Iterable[str | Value]:
    corrected = iter(holm([p for p in values if p is not None]))
    return [
        MISSING if p is None else Value(p_value(p), f"Holm {p_value(next(corrected))}")
        for p in values
    ]


def _published(accuracy: float | None) -> str:
    return MISSING if accuracy is None else f"{accuracy:.2f}%"


def _in_papers_order(results: Results) -> list[str]:
    known = [variant for variant in paper.ORDER if variant in (BASE, *results.methods)]
    return list(dict.fromkeys(chain(known, results.methods)))


def _row_name(results: Results, variant: str) -> str:
    return results.label(variant) if variant == BASE else f"+ {results.label(variant)}"


def _task_columns(results: Results) -> list[tuple[str, str]]:
    """The tasks that are tested, each with each of its judges."""
    return [(task, judge) for task in results.tasks for judge in results.judges(task)]


def _judged(results: Results, title: str, task: str, judge: str) -> str:
    """The title of a column that counts by a judge, whom it names where a task has several."""
    return f"{title}, {NAMES[judge]}" if len(results.judges(task)) > 1 else title


def _role(task: str) -> str:
    return f"{task} ({paper.NAMES[task]})" if task in paper.NAMES else task
