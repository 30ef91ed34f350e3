"""The statistics of an experiment against scipy, published examples, and simulations."""

import itertools

import numpy as np
import pytest
from scipy import stats

from mr1_fast.accuracy import wilson_interval
from mr1_fast.experiment.statistics import (
    accuracy,
    compare,
    detectable,
    equivalence_bound,
    expected_bound,
    holm,
    mcnemar,
    mean_over_seeds,
    newcombe_interval,
    paired_test,
)

pytestmark = pytest.mark.filterwarnings("error")


def run(right, count=100):
    return np.arange(count) < right


def paired(both, first, second, neither):
    """Two runs from the counts of a 2 × 2 table."""
    counts = (both, first, second, neither)
    return np.repeat([True, True, False, False], counts), np.repeat(
        [True, False, True, False], counts
    )


def test_accuracy_over_seeds_is_students_interval():
    estimate = accuracy([run(50), run(60), run(67)])
    expected = stats.ttest_1samp([0.5, 0.6, 0.67], 0).confidence_interval(0.95)
    assert (estimate.value, estimate.low, estimate.high) == pytest.approx(
        (0.59, expected.low, expected.high)
    )


def test_accuracy_interval_stays_between_0_and_1():
    low, high = accuracy([run(1), run(9)]), accuracy([run(99), run(91)])
    assert low.low == 0.0 and low.high > 0.09
    assert high.high == 1.0 and high.low < 0.91


@pytest.mark.parametrize("seeds", [1, 3])
@pytest.mark.parametrize("right", [0, 37, 100])
def test_seeds_that_do_not_differ_get_wilsons_interval(seeds, right):
    estimate = accuracy([run(right)] * seeds)
    assert (estimate.value, estimate.low, estimate.high) == (
        right / 100,
        *wilson_interval(right, 100),
    )
    if right == 37:
        assert (estimate.low, estimate.high) == pytest.approx((0.2818, 0.4678), abs=1e-4)


@pytest.mark.parametrize(
    ("table", "low", "high"),
    [  # Fagerland, Lydersen, Laake: Statistical Analysis of Contingency Tables, 2017, chapter 8
        (
            (1, 1, 7, 12),
            -0.5069,
            -0.0256,
        ),  # Bentur et al. 2009: airway hyper-responsiveness before and after
        ((59, 6, 16, 80), -0.1186, -0.0046),  # Cavo et al. 2012: complete response before and after
    ],
)
def test_newcombe_interval_of_published_tables(table, low, high):
    first, second = paired(*table)
    assert newcombe_interval(first, second) == pytest.approx((low, high), abs=1e-4)
    assert newcombe_interval(second, first) == pytest.approx((-high, -low), abs=1e-4)


@pytest.mark.parametrize(
    "table", [(5, 0, 0, 5), (10, 0, 0, 0), (0, 0, 0, 10), (0, 10, 0, 0), (0, 0, 10, 0)]
)
def test_newcombe_interval_of_extreme_tables(table):
    first, second = paired(*table)
    low, high = newcombe_interval(first, second)
    assert -1 <= low <= first.mean() - second.mean() <= high <= 1
    assert low < high or first.tolist() == second.tolist()


def test_newcombe_interval_covers():
    """The interval covers the true difference of 0.1 in 95% of 2,000 pairs of correlated runs."""
    random = np.random.default_rng(0)
    ease = random.random((2000, 80, 1))
    own = random.random((2000, 80, 2))
    values = np.where(random.random((2000, 80, 1)) < 0.6, ease, own)
    runs = values < np.array([0.5, 0.4])
    hits = [low <= 0.1 <= high for low, high in (newcombe_interval(*each.T) for each in runs)]
    assert 0.94 <= np.mean(hits) <= 0.97


def test_mcnemar_of_one_seed_is_the_binomial_test_of_discordant_pairs():
    for only_first, only_second in itertools.product((0, 1, 5, 30), (1, 6, 31)):
        first, second = paired(20, only_first, only_second, 40)
        exact = stats.binomtest(only_first, only_first + only_second, 0.5).pvalue
        assert mcnemar(first.astype(int) - second) == pytest.approx(exact)
    assert mcnemar(np.zeros(10, dtype=int)) == 1.0


def test_mcnemar_of_seeds_is_exact_over_all_signs():
    differences = np.array([3, -1, 2, 2, 0, 1, -3, 1, 2])
    signs = np.array(list(itertools.product((-1, 1), repeat=8)))
    totals = signs @ differences[differences != 0]
    assert mcnemar(differences) == pytest.approx(np.mean(np.abs(totals) >= 7))


def test_mcnemar_keeps_its_level_where_items_have_their_difficulty_in_common():
    """Two models are equally good, but not at the same items.

    A test that pooled the pairs of all 5 seeds would find a difference far too often.
    """
    random = np.random.default_rng(1)
    skew = random.choice([0.2, 0.8], size=(500, 1, 100))  # which of the two an item suits
    first = random.random((500, 5, 100)) < skew
    second = random.random((500, 5, 100)) < 1 - skew
    differences = first.astype(int) - second
    alarms = np.mean([mcnemar(each.sum(axis=0)) < 0.05 for each in differences])
    pooled = [
        stats.binomtest(int((d > 0).sum()), int((d != 0).sum())).pvalue < 0.05 for d in differences
    ]
    assert 0.02 <= alarms <= 0.07
    assert np.mean(pooled) > 0.15


def test_compare_over_seeds_is_the_paired_t_test():
    first, second = [run(60), run(64), run(71)], [run(50), run(61), run(60)]
    result = compare(first, second)
    expected = stats.ttest_rel([0.6, 0.64, 0.71], [0.5, 0.61, 0.6])
    interval = expected.confidence_interval(0.95)
    assert result.p_seeds == pytest.approx(expected.pvalue)
    difference = result.difference
    assert (difference.value, difference.low, difference.high) == pytest.approx(
        (0.08, interval.low, interval.high)
    )
    assert result.p_items == pytest.approx(
        stats.binomtest(0, 21).pvalue
    )  # items 50 … 70 differ, all one way


def test_compare_one_seed_has_only_its_items():
    first, second = paired(59, 6, 16, 80)
    result = compare([first], [second])
    assert result.p_seeds is None
    assert result.p_items == pytest.approx(stats.binomtest(6, 22).pvalue)
    difference = result.difference
    assert (difference.value, difference.low, difference.high) == pytest.approx(
        (-0.0621, -0.1186, -0.0046), abs=1e-4
    )


@pytest.mark.parametrize("gain", [0, 7])
def test_seeds_that_all_have_the_same_difference_are_no_proof(gain):
    """0.3 − 0.1 and 0.4 − 0.2 differ in their last bits only: that is no scatter to divide by."""
    second = [run(10), run(20), run(30)]
    result = compare([run(10 + gain), run(20 + gain), run(30 + gain)], second)
    assert result.p_seeds is None
    assert result.difference.value == pytest.approx(gain / 100)
    low, high = newcombe_interval(run(10 + gain), run(10))
    assert (result.difference.low, result.difference.high) == (low, high)
    assert result.p_items == (1.0 if gain == 0 else pytest.approx(2 * 0.5 ** (3 * gain)))


def test_seed_intervals_and_p_values_keep_their_promise():
    """Three training seeds answer the same items; the gain scatters around 0 by 2 points."""
    random = np.random.default_rng(2)
    ease = random.random(300)
    covered, alarms, hits = [], [], []
    for _ in range(1500):
        base = 0.4 + 0.04 * random.standard_normal(3)
        gain = 0.02 * random.standard_normal(3)
        luck = np.where(random.random((2, 3, 300)) < 0.3, random.random((2, 3, 300)), ease)
        first, second = list(luck[0] < (base + gain)[:, None]), list(luck[1] < base[:, None])
        result, estimate = compare(first, second), accuracy(second)
        covered.append(result.difference.low <= 0 <= result.difference.high)
        hits.append(estimate.low <= 0.3 * 0.4 + 0.7 * np.mean(ease < 0.4) <= estimate.high)
        alarms.append(result.p_seeds is not None and result.p_seeds < 0.05)
    assert 0.93 <= np.mean(covered) <= 0.97
    assert 0.93 <= np.mean(hits) <= 0.97
    assert 0.03 <= np.mean(alarms) <= 0.07


def test_holm_corrects_step_by_step():
    assert holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx(
        [0.03, 0.06, 0.06, 0.02]
    )  # R's p.adjust
    assert holm([0.5, 0.9, 0.02]) == pytest.approx([1.0, 1.0, 0.06])
    assert holm([0.03]) == [0.03] and holm([]) == []


def test_mean_over_seeds_is_students_interval_of_numbers():
    estimate = mean_over_seeds([0.5, 0.6, 0.67])
    expected = stats.ttest_1samp([0.5, 0.6, 0.67], 0).confidence_interval(0.95)
    assert (estimate.low, estimate.high) == pytest.approx((expected.low, expected.high))
    alone = mean_over_seeds([0.4])
    assert (alone.value, alone.low, alone.high) == (0.4, 0.4, 0.4)


def test_paired_test_is_the_paired_t_test():
    first, second = np.array([0.6, 0.64, 0.71, 0.5]), np.array([0.5, 0.61, 0.6, 0.52])
    result = paired_test(list(first - second))
    expected = stats.ttest_rel(first, second)
    interval = expected.confidence_interval(0.95)
    assert result.p == pytest.approx(expected.pvalue)
    assert (result.difference.low, result.difference.high) == pytest.approx(tuple(interval))
    assert result.deviation == pytest.approx(np.std(first - second, ddof=1))


@pytest.mark.parametrize(("difference", "p"), [(0.0, 1.0), (0.2, 0.125)])
def test_paired_test_without_scatter_is_the_sign_test(difference, p):
    """The differences of 0.3 − 0.1 and 0.4 − 0.2 part in their last bits only."""
    first = np.array([0.1, 0.2, 0.3, 0.7]) + difference
    result = paired_test(list(first - np.array([0.1, 0.2, 0.3, 0.7])))
    assert (result.p, result.deviation) == (p, 0.0)
    assert result.bound == pytest.approx(difference)


@pytest.mark.parametrize("shift", [-0.03, 0.0, 0.05])
def test_equivalence_bound_is_where_both_one_sided_tests_reach_their_level(shift):
    differences = np.random.default_rng(3).normal(shift, 0.04, 7)
    bound = equivalence_bound(differences)
    below = stats.ttest_1samp(differences, bound, alternative="less").pvalue
    above = stats.ttest_1samp(differences, -bound, alternative="greater").pvalue
    assert max(below, above) == pytest.approx(0.05)


def test_equivalence_bound_is_below_the_true_difference_in_one_case_of_twenty():
    samples = np.random.default_rng(4).normal(0.05, 0.03, (1000, 6))
    wrong = np.mean([equivalence_bound(sample) < 0.05 for sample in samples])
    assert 0.03 <= wrong <= 0.07


@pytest.mark.parametrize("seeds", [3, 8])
def test_expected_bound_is_the_mean_of_simulated_bounds(seeds):
    samples = np.random.default_rng(5).normal(0.0, 0.03, (800, seeds))
    mean = np.mean([equivalence_bound(sample) for sample in samples])
    assert expected_bound(0.03, seeds) == pytest.approx(mean, rel=0.04)


@pytest.mark.parametrize(("seeds", "alpha"), [(5, 0.05), (10, 0.05), (10, 0.05 / 58)])
def test_a_detectable_difference_is_found_with_the_power_asked_for(seeds, alpha):
    difference = detectable(0.04, seeds, alpha, power=0.8)
    samples = np.random.default_rng(6).normal(difference, 0.04, (20_000, seeds))
    found = np.mean(stats.ttest_1samp(samples, 0.0, axis=1).pvalue < alpha)
    assert found == pytest.approx(0.8, abs=0.01)


def test_detectable_differences_agree_with_published_power():
    """Two-sided, α = 0.05, power 0.8: a paired t-test of 34 pairs finds half a deviation.

    J. Cohen, Statistical Power Analysis, 1988; G*Power gives n = 34 and a power of 0.808.
    """
    assert detectable(1.0, 33) > 0.5 > detectable(1.0, 34)
    assert detectable(0.1, 5) == pytest.approx(0.1 * detectable(1.0, 5))
