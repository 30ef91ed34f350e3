"""The generated blocks of the documentation: name → text, from the archive alone."""

from collections.abc import Callable, Iterable
from functools import partial

import numpy as np

from mr1_fast.evaluate.held_out import MODES
from mr1_fast.experiment import paper
from mr1_fast.experiment.results import BASE
from mr1_fast.experiment.studies import STUDIES
from mr1_fast.experiment.tables import MISSING, interval, p_value, percent

from .archive import Archive, Archived, Record
from .design import comparisons, deviations, power
from .outcomes import (
    Finding,
    Values,
    average,
    cells_of,
    estimate,
    findings,
    late,
    pull_ratio,
    values,
)
from .questions import (
    FEW_STEPS,
    LONG_STEPS,
    QUESTIONS,
    SCREENED,
    SCREENING,
    Question,
    Side,
    label,
    tested,
)
from .words import accuracy, mean, number, points, progress, ranges, short, table

KEPT = ("mean β", "KL's pull / rewards'", "KL at the end", "entropy at the end")
"""What is shown of the training of a variant; the end is the last fifth of its steps."""

CAPTIONS = {
    "transfer": "Accuracy on both tasks after training on one of them",
    "lever": "Pull, KL and accuracies over the multiple of β, and the schedules",
    "long": "Accuracies, β, KL and entropy over 1,000 steps",
    "few": "Accuracies over 300 steps on 100 training items",
}
"""What the picture of each question shows."""

Blocks = dict[str, Callable[[], str]]
"""Name → what makes the block's text."""


def blocks(archive: Archive) -> Blocks:
    """All blocks that pages can name."""
    found = findings(archive)
    made: Blocks = {
        "power": power,
        "deviations": partial(deviations, found),
        "comparisons": comparisons,
        "cells": partial(cells, archive),
        "commands": partial(commands, archive),
        "progress": partial(standing, found),
        "lever-screening": partial(screening, archive),
    }
    tables = {"transfer": transfer, "lever": schedules, "long": over_steps, "few": few}
    for question in QUESTIONS:
        its = [finding for finding in found if finding.question is question]
        made[f"{question.name}-figure"] = partial(figure, archive, question)
        there = cells_of(archive, question)
        made |= _means(there, question)
        made[f"{question.name}-accuracies"] = partial(tables[question.name], there, question)
        made[f"{question.name}-comparisons"] = partial(compared, its)
        made[f"{question.name}-form"] = partial(form, there, question)
    for finding in found:
        made[f"difference {finding.planned.name}"] = partial(short, finding)
    return made


def _means(cells: Archived | None, question: Question) -> Blocks:
    """The accuracies of a question one by one, to stand in a line.

    `accuracy QUESTION VARIANT own` is the mean over the tasks that are trained, and
    `accuracy QUESTION VARIANT TRAINED own` that of one of them; so with `other`. `pull QUESTION
    VARIANT TRAINED` is how hard the KL pulls in training, in percent of the rewards.
    """
    made: Blocks = {}
    for variant in question.variants:
        for role in ("", *question.trained):
            trained = (role,) if role else question.trained
            for outcome in ("own", "other"):
                name = " ".join(filter(None, (question.name, variant, role, outcome)))
                found = values(cells, Side(variant), outcome, trained)
                made[f"accuracy {name}"] = partial(_accuracy, found, question)
        for role in question.trained:
            made[f"pull {question.name} {variant} {role}"] = partial(
                _pull, _there(cells, role, variant)
            )
    return made


def _pull(cells: list[Record]) -> str:
    ratio = _mean(pull_ratio(cell) for cell in cells)
    return MISSING if ratio is None else percent(ratio)


def _accuracy(found: Values, question: Question) -> str:
    return accuracy(estimate(found), len(found), len(question.seeds))


def figure(archive: Archive, question: Question) -> str:
    """The picture of a question, once it has cells to draw, for a page beside its folder."""
    presets = [question.preset, *([SCREENING] if question.name == "lever" else [])]
    cells = [cell for preset in presets if preset in archive for cell in archive[preset].cells]
    if not any(cell.trained for cell in cells):
        return "No cell of it is there yet."
    return f"![{CAPTIONS[question.name]}](experiment/{question.name}.svg)"


def transfer(cells: Archived | None, question: Question) -> str:
    """Accuracies on both tasks for each task that is trained, with changes from the base model."""
    pairs = [(role, outcome) for role in question.trained for outcome in ("own", "other")]
    head, rows = ["Model"], []
    for role, outcome in pairs:
        head.append(f"{role} → {tested(role, outcome)}")
        head += ["to base", "the paper's"] if outcome == "other" else []
    published = paper.CROSS_TASK["2B"]
    for variant in question.variants:
        row = [label(variant)]
        for role, outcome in pairs:
            found, base = (values(cells, Side(v), outcome, (role,)) for v in (variant, BASE))
            row.append(_accuracy(found, question))
            if outcome == "other":
                # The paper's figures show that its SFT imitates bare answers.
                name = "sft" if variant == "sft-answer" else variant
                reported = published[role, tested(role, outcome)].get(name, {}).get("base")
                row += [_change(found, base) if variant != BASE else MISSING]
                row += [MISSING if reported is None else number(reported, "+.2f") + "%"]
        rows.append(row)
    return table(head, rows)


def _change(found: Values, base: Values) -> str:
    """The relative change of the mean from that of the base model, over the same seeds."""
    shared = [seed for seed in found if seed in base]
    before = np.mean([base[seed] for seed in shared]) if shared else 0.0
    if not before:
        return MISSING
    return number(100 * (np.mean([found[seed] for seed in shared]) / before - 1), "+.1f") + "%"


def form(cells: Archived | None, question: Question) -> str:
    """What kind of text the greedy answers to the other task are, in shares of all of them."""
    head, rows = ["Model"], []
    for role in question.trained:
        head += [f"{role} → {tested(role, 'other')}: reasoned", "answered", "right"]
    for variant in question.variants:
        row = [label(variant)]
        for role in question.trained:
            task = tested(role, "other")
            there = [cell for cell in _there(cells, role, variant) if task in cell.form]
            for kind in ("reasoned", "answered"):
                shares = {cell.seed: cell.form[task][kind] / cells.items[task] for cell in there}
                row.append(mean(estimate(shares)))
            row.append(mean(estimate(values(cells, Side(variant), "other", (role,)))))
        rows.append(row)
    return table(head, rows)


def schedules(cells: Archived | None, question: Question) -> str:
    """Accuracies on the trained and on the other task, with KL, entropy and pull of each path."""
    (role,) = question.trained
    columns = [(outcome, mode) for outcome in ("own", "other") for mode in MODES]
    head = ["Variant", *(f"{outcome} task, {mode}" for outcome, mode in columns), *KEPT]
    rows = []
    for variant in question.variants:
        shares = [values(cells, Side(variant), outcome, (role,), mode) for outcome, mode in columns]
        row = [label(variant), *(_accuracy(found, question) for found in shares)]
        rows.append([*row, *_kept(_there(cells, role, variant))])
    return table(head, rows)


def _there(cells: Archived | None, role: str, variant: str) -> list[Record]:
    """The cells of a variant, one a seed."""
    if cells is None:
        return []
    return list(cells.of(variant, None if variant == BASE else role).values())


def _kept(cells: list[Record]) -> list[str]:
    """β, pull, KL and entropy in the mean over cells: see `KEPT`."""
    kept = [[average(cell, "beta") for cell in cells], [pull_ratio(cell) for cell in cells]]
    kept += [[late(cell, name) for cell in cells] for name in ("kl", "entropy")]
    return [number(_mean(each)) for each in kept]


def _mean(found: Iterable[float | None]) -> float | None:
    """The mean over cells; None where there is none, or one has no number."""
    each = list(found)
    return None if None in each or not each else float(np.mean(each))


def _with_curve(
    cells: Archived | None, question: Question, columns: dict[str, tuple[int, ...]]
) -> str:
    """Accuracies at steps of the learning curve, and in the test after the last step.

    `columns` is outcome → the steps.
    """
    head, rows = ["Variant"], []
    for outcome, steps in columns.items():
        head += [f"{outcome}, step {step}" for step in steps]
        head += [f"{outcome}, test, {mode}" for mode in MODES]
    for variant in question.variants:
        row = [label(variant)]
        for outcome, steps in columns.items():
            for step in steps:
                found = values(cells, Side(variant, step), outcome, question.trained)
                row.append(mean(estimate(found)))
            for mode in MODES:
                found = values(cells, Side(variant), outcome, question.trained, mode)
                row.append(_accuracy(found, question))
        rows.append(row)
    return table(head, rows)


def over_steps(cells: Archived | None, question: Question) -> str:
    """Accuracies of the long runs at some steps and in the test."""
    return _with_curve(cells, question, {"own": (0, *LONG_STEPS), "other": (0, *LONG_STEPS)})


def few(cells: Archived | None, question: Question) -> str:
    """Accuracies of the runs on few items at some steps and in the test."""
    return _with_curve(cells, question, {"own": (0, *FEW_STEPS), "other": (0, *FEW_STEPS)})


def screening(archive: Archive) -> str:
    """What each multiple of β does: descriptive, on a seed that is not reported."""
    cells = archive.get(SCREENING)
    head = ["Variant", "Seeds", *KEPT]
    head += ["own task", "sampled", "best on validation", "other task"]
    schedules = [f"{kind}-x{times:g}" for times in SCREENED for kind in ("constant", "grpo-d")]
    (role,) = STUDIES["lever"].trained
    rows = [_screened(cells, role, variant) for variant in (BASE, "no-kl", *schedules)]
    return table(head, rows)


def _screened(cells: Archived | None, role: str, variant: str) -> list[str]:
    """A row of the screening: means over its seeds."""
    there = _there(cells, role, variant)
    if not there:
        return [label(variant), "not run", *[MISSING] * (len(KEPT) + 4)]
    own, other = (
        percent(estimate(values(cells, Side(variant), outcome, (role,))).value)
        for outcome in ("own", "other")
    )
    sampled = np.mean([cell.right[role]["sampled"] / cells.items[role] for cell in there])
    best = _mean(max(cell.curve[role]) if cell.curve else None for cell in there)
    on_the_way = MISSING if best is None else percent(best)
    shares = [own, percent(float(sampled)), on_the_way, other]
    return [label(variant), str(len(there)), *_kept(there), *shares]


def compared(found: list[Finding]) -> str:
    """The comparisons of a question: differences, p values and equivalence bounds.

    Greedy and sampled answers stand in one row.
    """
    head = ["", "Accuracy", "First − second"]
    for mode in MODES:
        head += [f"{mode.capitalize()}: points [95%], seeds above", "p (Holm's)", "at most"]
    by_name = {finding.planned.name: finding for finding in found}
    rows = []
    for name, greedy in by_name.items():
        planned = greedy.planned
        if planned.mode == "greedy":
            row = [name, planned.where, f"{planned.first.label} − {planned.second.label}"]
            rows.append([*row, *_tested(greedy), *_tested(by_name.get(f"{name}s"))])
    return table(head, rows)


def _tested(finding: Finding | None) -> list[str]:
    """Difference, p with Holm's, and equivalence bound; how far it is while seeds are missing."""
    if finding is None:
        return [MISSING] * 3
    test = finding.test
    difference = MISSING
    if test:
        above = f"{finding.first_above} of {len(finding.differences)}"
        difference = f"{points(test.difference.value)} {interval(test.difference)}, {above}"
    if not finding.complete:
        return [difference, progress(finding), MISSING]
    p = f"{p_value(test.p)} ({p_value(finding.holm)})"
    return [difference, p, f"{100 * test.bound:.1f}"]


def cells(archive: Archive) -> str:
    """How many cells of each preset there are, their time, and what they ran on."""
    head = ["Preset", "Cells", "Seeds", "Hours, summed over cells", "Date", "Hardware", "Versions"]
    rows, all_cells, all_hours = [], 0, 0.0
    for preset, found in archive.items():
        hours = sum(sum(cell.seconds.values()) for cell in found.cells) / 3600
        seeds = ranges(sorted({cell.seed for cell in found.cells}))
        rows.append([f"`{preset}`", str(len(found.cells)), seeds])
        dates = "–".join(dict.fromkeys((min(found.dates), max(found.dates))))
        rows[-1] += [f"{hours:.1f}", dates, "; ".join(found.hardware), "; ".join(found.versions)]
        all_cells, all_hours = all_cells + len(found.cells), all_hours + hours
    rows.append(["all", str(all_cells), "", f"{all_hours:.1f}", "", "", ""])
    return table(head, rows)


def commands(archive: Archive) -> str:
    """The commands that have run the cells."""
    lines = [command for found in archive.values() for command in found.commands]
    return "\n".join(["```sh", *lines, "```"])


def standing(found: list[Finding]) -> str:
    """How many comparisons are complete, and how many of them show a difference."""
    complete = [finding for finding in found if finding.complete]
    if not complete:
        return f"None of {len(found)} comparisons is complete."
    shown = sum(finding.shown for finding in complete)
    return (
        f"{len(complete)} of {len(found)} comparisons are complete; {shown} of them show a "
        f"difference after Holm's correction for all {len(found)}, {len(complete) - shown} do not."
    )
