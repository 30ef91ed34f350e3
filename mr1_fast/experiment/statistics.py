"""What accuracies and their differences are worth, over training seeds and over test items.

Two questions are kept apart. Would new training runs say the same? That is answered over seeds. Do these very models
differ on such items? That is answered over items. A run is a bool array, right or wrong of each test item; runs that
are compared have seeds and items in the same order.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import stats

from ..accuracy import wilson_interval

Runs = Sequence[np.ndarray]
"""A run per seed, bools of shape (items,)."""


@dataclass(frozen=True)
class Estimate:
    """A share, or a difference of shares, with its 95% interval."""

    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Comparison:
    """First minus second, and how likely a difference this large is if there is none."""

    difference: Estimate
    p_seeds: float | None
    """Paired t-test over seeds: about the method. None where seeds show no scatter to measure it by."""
    p_items: float
    """McNemar's exact test over items: about these trained models."""


def accuracy(runs: Runs) -> Estimate:
    """Mean accuracy: Student's interval over seeds, within 0 … 1.

    Where seeds do not differ, there being one or the same model in all, it is Wilson's interval over the items.
    """
    counts = [int(run.sum()) for run in runs]
    if len(set(counts)) == 1:
        return Estimate(runs[0].mean(), *wilson_interval(counts[0], len(runs[0])))
    return _student([run.mean() for run in runs], 0.0)


def compare(first: Runs, second: Runs) -> Comparison:
    """The paired comparison of two variants.

    The interval is Student's over seeds, within −1 … 1; where all seeds have the same difference (or there is only one)
    it is Newcombe's over the items of the first seed.
    """
    ours, theirs = np.array(first, dtype=int), np.array(second, dtype=int)
    p_items = mcnemar((ours - theirs).sum(axis=0))
    differences = (ours - theirs).sum(
        axis=1
    )  # exact: whether seeds differ does not hang on rounding
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
    """The two-sided p of McNemar's exact test; `differences` per item are summed over seeds.

    With one seed they are −1, 0 or 1 and it is the binomial test of the discordant pairs (Q. McNemar, 1947). With more,
    the seeds of an item stay together, for its difficulty is theirs in common: under the hypothesis each item's sum
    is as likely to have the other sign, and the distribution of the total over all signs is exact.
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
    """95% interval of mean(first) − mean(second), paired: method 10 of R. G. Newcombe, Stat. Med. 17 (1998) 2635."""
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
    """Each p corrected for their number, in the same order (S. Holm, 1979)."""
    corrected, largest = list(p_values), 0.0
    for rank, index in enumerate(np.argsort(p_values, kind="stable")):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected
