"""Intervals and tests for accuracies and their differences, over training seeds and test items.

Two questions are kept apart. Would new training runs say the same? That is answered over seeds. Do
these very models differ on items of this kind? That is answered over items.

A run is a bool array of shape (items,), whether each test item is answered right. Runs that are
compared have their seeds and their items in the same order. Where one number a seed is known, such
as a point of a learning curve, there are functions of those numbers.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy import optimize, stats

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


@dataclass(frozen=True)
class PairedTest:
    """Two variants compared over seeds, from the difference of one number a seed."""

    difference: Estimate
    """The mean difference with Student's 95% interval."""
    deviation: float
    """The standard deviation of the differences over seeds."""
    p: float
    """Of "there is no difference", two-sided."""
    bound: float
    """The equivalence bound: see `equivalence_bound`."""


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


def mean_over_seeds(values: Sequence[float], lowest: float = 0.0) -> Estimate:
    """The mean of one number a seed, with Student's 95% interval, cut to [`lowest`, 1].

    Where the seeds do not differ, or where there is one, the interval is the mean alone.
    """
    if np.ptp(values) <= _SAME:
        return Estimate(float(values[0]), float(values[0]), float(values[0]))
    return _student(values, lowest)


def paired_test(differences: Sequence[float]) -> PairedTest:
    """The paired t-test over seeds; `differences` are first minus second, two seeds or more.

    Where all seeds have the same difference there is no scatter to divide by: p is then that of the
    exact sign test, 2^(1−n), or 1 for a difference of 0.
    """
    estimate, bound = mean_over_seeds(differences, -1.0), equivalence_bound(differences)
    if np.ptp(differences) <= _SAME:
        p = 1.0 if abs(differences[0]) <= _SAME else 0.5 ** (len(differences) - 1)
        return PairedTest(estimate, 0.0, p, bound)
    p = float(stats.ttest_1samp(differences, 0.0).pvalue)
    return PairedTest(estimate, float(np.std(differences, ddof=1)), p, bound)


_SAME = 1e-9
"""Shares that are nearer than this differ by rounding alone: they are counts over counts."""


def equivalence_bound(differences: Sequence[float], alpha: float = 0.05) -> float:
    """The smallest margin at which two variants are called equivalent, from one number a seed.

    It is the smallest δ for which two one-sided paired t-tests, of "the difference is −δ or less"
    and of "it is δ or more", both reject at `alpha` (D. J. Schuirmann, J. Pharmacokinet. Biopharm.
    15 (1987) 657): the larger absolute end of the 1 − 2·alpha interval of the mean difference.
    """
    reach = stats.t.isf(alpha, len(differences) - 1) * stats.sem(differences)
    return float(abs(np.mean(differences)) + reach)


def expected_bound(deviation: float, seeds: int, alpha: float = 0.05) -> float:
    """The mean of `equivalence_bound` over experiments with `seeds` seeds and no true difference.

    `deviation` is the standard deviation σ of the normal differences of a seed. With n seeds it is
    σ/√n · (E|Z| + t·E[s]/σ): √(2/π) is the mean of |Z| for a standard normal Z, and
    E[s]/σ = √(2/(n−1)) · Γ(n/2)/Γ((n−1)/2) that of a sample's standard deviation.
    """
    scatter = stats.chi.mean(seeds - 1) / np.sqrt(seeds - 1)
    reach = np.sqrt(2 / np.pi) + stats.t.isf(alpha, seeds - 1) * scatter
    return float(deviation / np.sqrt(seeds) * reach)


def detectable(deviation: float, seeds: int, alpha: float = 0.05, power: float = 0.8) -> float:
    """The smallest true difference that a two-sided paired t-test shows with this power.

    `deviation` is the standard deviation σ of the normal differences of a seed. For a difference δ
    the statistic of n seeds has the noncentral t distribution with n−1 degrees of freedom and
    noncentrality δ·√n/σ (J. Cohen, Statistical Power Analysis, 1988, chapter 2).
    """
    critical = stats.t.isf(alpha / 2, seeds - 1)

    # The statistic is (Z + shift)/S. SciPy's `nct` is NaN far from its middle, so the mean over S
    # is taken here, at the middles of equal parts of its distribution.
    middles = (np.arange(_PARTS) + 0.5) / _PARTS
    limits = critical * stats.chi.ppf(middles, seeds - 1) / np.sqrt(seeds - 1)

    def missing(shift: float) -> float:
        beyond = stats.norm.sf(limits - shift) + stats.norm.cdf(-limits - shift)
        return float(power - beyond.mean())

    # Beyond the largest limit nearly every sample is found.
    shift = optimize.brentq(missing, 0.0, float(limits[-1]) + 10.0)
    return float(shift * deviation / np.sqrt(seeds))


_PARTS = 2000
"""The parts of the distribution of a sample's standard deviation that a power is computed from."""


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
