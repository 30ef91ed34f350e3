"""The generated blocks of the design: the planned comparisons, and the power to see anything."""

from collections.abc import Callable
from functools import partial

import numpy as np

from mr1_fast.experiment.statistics import detectable, expected_bound

from .outcomes import Finding
from .questions import PLANNED, QUESTIONS
from .words import ranges, table

STRICTEST = 0.05 / len(PLANNED)
"""The level at which Holm's correction tests the smallest of all p values."""

SEEDS = tuple(sorted({len(question.seeds) for question in QUESTIONS}))
DEVIATIONS = (0.01, 0.02, 0.03, 0.04, 0.06, 0.08)
"""Standard deviations of a seed's difference that the power analysis goes through."""


def comparisons() -> str:
    """All comparisons as they were fixed, question by question."""
    head = ["", "Preset", "Seeds", "First", "Second", "Accuracy", "Answers"]
    names = {planned.name for planned in PLANNED}
    rows = [
        [
            planned.name,
            f"`{question.preset}`",
            ranges(question.seeds),
            planned.first.label,
            planned.second.label,
            planned.where,
            "greedy, sampled" if f"{planned.name}s" in names else "greedy",
        ]
        for question in QUESTIONS
        for planned in question.comparisons
        if planned.mode == "greedy"
    ]
    return table(head, rows)


def power() -> str:
    """What difference n seeds can show, and what bound they give where there is none, in points.

    A column is a standard deviation of the differences of a seed.
    """
    measures: dict[str, Callable[[float, int], float]] = {
        "detectable, α = 0.05": detectable,
        f"detectable, α = 0.05/{len(PLANNED)}": partial(detectable, alpha=STRICTEST),
        "bound where there is no difference": expected_bound,
    }
    rows = [
        [f"{seeds} seeds", name, *(f"{100 * measure(each, seeds):.1f}" for each in DEVIATIONS)]
        for seeds in SEEDS
        for name, measure in measures.items()
    ]
    return table(["", "", *(f"σ = {100 * each:.0f}" for each in DEVIATIONS)], rows)


def deviations(found: list[Finding]) -> str:
    """The standard deviations of a seed's difference that were observed, by kind of outcome."""
    head = ["Question", "Outcome", "Comparisons", "Smallest", "Median", "Largest"]
    rows = []
    for question in QUESTIONS:
        for kind in (
            "own",
            "other",
            "own, sampled",
            "other, sampled",
            "own, curve",
            "other, curve",
        ):
            seen = [
                100 * finding.test.deviation
                for finding in found
                if finding.question is question and finding.complete and _kind(finding) == kind
            ]
            if seen:
                spread = [f"{value:.1f}" for value in (min(seen), np.median(seen), max(seen))]
                rows.append([question.title, kind, str(len(seen)), *spread])
    return table(head, rows) if rows else "No comparison is complete."


def _kind(finding: Finding) -> str:
    planned = finding.planned
    sampled = ", sampled" if planned.mode == "sampled" else ""
    return planned.outcome + (", curve" if planned.on_curve else sampled)
