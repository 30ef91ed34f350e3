"""Intervals and tests for accuracies and their differences, over training seeds and test items.

Two questions are kept apart. Would new training runs say the same? That is answered over seeds. Do
these very models differ on items of this kind? That is answered over items.

A run is a bool array of shape (items,), whether each test item is answered right. Runs that are
compared have their seeds and their items in the same order.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from ..accuracy import wilson_interval

Runs = Sequence[np.ndarray]
"""A run for each seed; each is a bool array of shape (items,)."""


@dataclass(frozen=True)
class Estimate:
    """A share, or a difference of two shares, with its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """The difference of two variants, first minus second, with p values of "there is none"."""

    difference: Estimate
    p_seeds: float | None
    """Of a paired t-test over seeds, about the methods; None if all seeds agree."""
    p_items: float
    """Of an exact test over items, McNemar's for one seed: about these trained models."""


def accuracy(runs: Runs) -> Estimate:
    """The mean accuracy, with Student's interval over seeds, cut to [0, 1].

    If all seeds have the same accuracy, because there is one seed or one model in all, the interval
    is Wilson's over the items.
    """
    counts = [int(run.sum()) for run in runs]
    if len(set(counts)) == 1:
        return Estimate(runs[0].mean(), *wilson_interval(counts[0], len(runs[0])))
    return _student([run.mean() for run in runs], 0.0)


def compare(first: Runs, second: Runs) -> Comparison:
    """The paired comparison of two variants.

    The interval is Student's over seeds, cut to [−1, 1]. If all seeds have the same difference, or
    if there is one seed, it is Newcombe's over the items of the first seed.
    """
    ours, theirs = np.array(first, dtype=int), np.array(second, dtype=int)
    p_items = mcnemar((ours - theirs).sum(axis=0))

    # As whole numbers, so that rounding does not decide whether seeds differ.
    differences = (ours - theirs).sum(axis=1)
    if len(set(differences.tolist())) == 1:
        low, high = newcombe_interval(first[0], second[0])
        return Comparison(Estimate(differences[0] / ours.shape[1], low, high), None, p_items)
    p_seeds = float(stats.ttest_rel(ours.mean(axis=1), theirs.mean(axis=1)).pvalue)
    return Comparison(_student(differences / ours.shape[1], -1.0), p_seeds, p_items)


def _student(values: Sequence[float], lowest: float) -> Estimate:
    mean = float(np.mean(values))
    low, high = stats.t.interval(0.95, len(values) - 1, loc=mean, scale=stats.sem(values))
    return Estimate(mean, max(lowest, float(low)), min(1.0, float(high)))


def mcnemar(differences: np.ndarray) -> float:
    """The two-sided p of an exact sign test; `differences`, of shape (items,), are sums over seeds.

    With one seed each difference is −1, 0 or 1, and this is McNemar's test, the binomial test of
    the discordant pairs (Q. McNemar, Psychometrika 12 (1947) 153). With several seeds, those of an
    item stay together, since its difficulty is common to them: under the hypothesis, the sum of
    each item is as likely to have the other sign, and the distribution of the total over all
    choices of signs is computed exactly.
    """
    sizes, counts = np.unique(np.abs(differences[differences != 0]), return_counts=True)
    chances = np.ones(1)
    for size, count in zip(sizes, counts, strict=True):
        positive = np.zeros(size * count + 1)
        positive[::size] = stats.binom.pmf(np.arange(count + 1), count, 0.5)
        chances = np.convolve(chances, positive)
    totals = 2 * np.arange(len(chances)) - (len(chances) - 1)
    return min(1.0, float(chances[np.abs(totals) >= abs(differences.sum())].sum()))


def newcombe_interval(first: np.ndarray, second: np.ndarray) -> tuple[float, float]:
    """The 95% interval of mean(first) − mean(second) for two paired runs.

    It is method 10 of R. G. Newcombe, Stat. Med. 17 (1998) 2635.
    """
    count, right, right_too = len(first), int(first.sum()), int(second.sum())
    both = int((first & second).sum())
    product = both * (count - right - right_too + both) - (right - both) * (right_too - both)
    margins = right * right_too * (count - right) * (count - right_too)
    corrected = max(product - count / 2, 0) if product > 0 else product
    phi = corrected / np.sqrt(margins) if margins else 0.0
    p, (p_low, p_high) = right / count, wilson_interval(right, count)
    q, (q_low, q_high) = right_too / count, wilson_interval(right_too, count)

    def reach(a: float, b: float) -> float:
        return float(np.sqrt(max(0.0, a * a - 2 * phi * a * b + b * b)))

    return p - q - reach(p - p_low, q_high - q), p - q + reach(p_high - p, q - q_low)


def holm(p_values: Sequence[float]) -> list[float]:
    """The p values in the same order, each corrected for their number.

    The correction is that of S. Holm, Scand. J. Statist. 6 (1979) 65.
    """
    corrected, largest = list(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected
