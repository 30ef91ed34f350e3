"""What the cells of the archive say: accuracies over seeds, and tests of the comparisons."""

from collections.abc import Iterable
from dataclasses import dataclass, replace

import numpy as np

from mr1_fast.experiment.results import BASE
from mr1_fast.experiment.statistics import Estimate, PairedTest, holm, mean_over_seeds, paired_test

from .archive import Archive, Archived, Record
from .questions import QUESTIONS, Planned, Question, Side, tested

Values = dict[int, float]
"""Seed → a number."""


@dataclass(frozen=True)
class Finding:
    """A comparison with what its cells say so far."""

    planned: Planned
    question: Question
    differences: Values
    """Seed → difference, for the seeds whose cells are all there."""
    test: PairedTest | None
    """The test over these seeds; None for fewer than two."""
    holm: float | None = None
    """Its p corrected for the number of all comparisons; None while it is incomplete."""

    @property
    def complete(self) -> bool:
        """Whether all its seeds are there."""
        return set(self.differences) >= set(self.question.seeds)

    @property
    def shown(self) -> bool:
        """Whether there is a difference after correction."""
        return self.holm is not None and self.holm < 0.05

    @property
    def first_above(self) -> int:
        """The number of seeds in which the first side is above the second."""
        return sum(difference > 0 for difference in self.differences.values())


def findings(archive: Archive) -> list[Finding]:
    """All fixed comparisons in their order, with one correction for the number of all.

    One that is not complete counts with p = 1. So a difference that is shown stays shown, whatever
    the missing cells say: a smaller p makes no other corrected p larger.
    """
    found = [
        _finding(archive, question, planned)
        for question in QUESTIONS
        for planned in question.comparisons
    ]
    corrected = holm([finding.test.p if finding.complete else 1.0 for finding in found])
    return [
        replace(finding, holm=p) if finding.complete else finding
        for finding, p in zip(found, corrected, strict=True)
    ]


def cells_of(archive: Archive, question: Question) -> Archived | None:
    """The cells of a question, which are those of its seeds; None where its preset has none.

    So its tables and figures are of the cells that its comparisons are of.
    """
    found = archive.get(question.preset)
    if found is None:
        return None
    return replace(found, cells=[cell for cell in found.cells if cell.seed in question.seeds])


def _finding(archive: Archive, question: Question, planned: Planned) -> Finding:
    cells = cells_of(archive, question)
    first, second = (
        values(cells, side, planned.outcome, planned.trained, planned.mode)
        for side in (planned.first, planned.second)
    )
    shared = [seed for seed in first if seed in second]
    differences = {seed: first[seed] - second[seed] for seed in shared}
    test = paired_test(list(differences.values())) if len(shared) > 1 else None
    return Finding(planned, question, differences, test)


def values(
    cells: Archived | None,
    side: Side,
    outcome: str,
    trained: Iterable[str],
    mode: str = "greedy",
) -> Values:
    """Seed → accuracy of a side, averaged over the tasks that are trained.

    A seed counts if its cells of all these tasks are there.
    """
    if cells is None:
        return {}
    by_task = []
    for role in trained:
        there = cells.of(side.variant, None if side.variant == BASE else role)
        task = tested(role, outcome)
        shares = {seed: _share(cells, cell, task, side.step, mode) for seed, cell in there.items()}
        by_task.append({seed: share for seed, share in shares.items() if share is not None})
    seeds = sorted(set.intersection(*map(set, by_task)))
    return {seed: float(np.mean([shares[seed] for shares in by_task])) for seed in seeds}


def _share(cells: Archived, cell: Record, task: str, step: int | None, mode: str) -> float | None:
    """The accuracy of a cell, at the end or at a step of its curve; None where it has no such."""
    if step is None:
        return cell.right[task][mode] / cells.items[task]
    steps = cell.curve.get("step", [])
    return cell.curve[task][steps.index(step)] if step in steps else None


def estimate(found: Values) -> Estimate | None:
    """The mean over seeds with its interval; None where there is no seed."""
    return mean_over_seeds(list(found.values())) if found else None


def curve(cells: list[Record], task: str) -> list[dict[float, float]]:
    """The learning curve of each cell on a task: step → accuracy."""
    return [
        dict(zip(cell.curve["step"], cell.curve[task], strict=True)) for cell in cells if cell.curve
    ]


def course(cells: list[Record], metric: str) -> list[dict[float, float]]:
    """A metric of each cell over training: middle of the block of steps → value.

    Blocks without a number are left out, and so are cells without the metric.
    """
    found = []
    for cell in cells:
        blocks = cell.metrics.get(metric, [])
        points = {
            (block + 0.5) * cell.every: value
            for block, value in enumerate(blocks)
            if value is not None
        }
        if points:
            found.append(points)
    return found


def mean_course(courses: list[dict[float, float]]) -> dict[float, float]:
    """The mean of several courses, at the steps that all of them have."""
    shared = sorted(set.intersection(*map(set, courses))) if courses else []
    return {step: float(np.mean([each[step] for each in courses])) for step in shared}


def late(cell: Record, metric: str) -> float | None:
    """The mean of a metric over the last fifth of training; None where it was not measured."""
    points = [value for value in cell.metrics.get(metric, []) if value is not None]
    return float(np.mean(points[-max(1, len(points) // 5) :])) if points else None


def average(cell: Record, metric: str) -> float | None:
    """The mean of a metric over training; None where it was not measured."""
    points = [value for value in cell.metrics.get(metric, []) if value is not None]
    return float(np.mean(points)) if points else None


def pull_ratio(cell: Record) -> float | None:
    """How hard the KL pulls at log π beside the rewards, as a ratio of means over training.

    The means over tokens are those of β·|1 − π_ref/π| and of |Â|: both multiply the gradient of a
    token's log π. None where they were not measured.
    """
    of_kl, of_rewards = average(cell, "kl_pull"), average(cell, "reward_pull")
    return of_kl / of_rewards if of_kl is not None and of_rewards else None
