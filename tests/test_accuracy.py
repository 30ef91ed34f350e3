"""How many answers are right: the statistics against values that were worked out otherwise."""

import itertools

import pytest

from mr1_fast.accuracy import pass_at_k, summarise, wilson_interval


@pytest.mark.parametrize(
    "correct, count, low, high",
    [
        (81, 263, 0.2553, 0.3662),  # R. G. Newcombe, Statistics in Medicine 17 (1998), table I
        (15, 148, 0.0624, 0.1605),
        (0, 20, 0.0, 0.1611),
        (1, 29, 0.0061, 0.1718),
    ],
)
def test_wilson_interval_has_its_published_values(correct, count, low, high):
    assert wilson_interval(correct, count) == (
        pytest.approx(low, abs=5e-5),
        pytest.approx(high, abs=5e-5),
    )


def test_wilson_interval_holds_the_share_and_is_symmetric():
    for count in (1, 7, 200):
        for correct in range(count + 1):
            low, high = wilson_interval(correct, count)
            assert 0 <= low <= correct / count <= high <= 1
            assert wilson_interval(count - correct, count) == (
                pytest.approx(1 - high),
                pytest.approx(1 - low),
            )


def test_pass_at_k_is_the_share_of_draws_with_a_right_answer():
    for n, k in ((1, 1), (4, 1), (4, 2), (4, 4), (6, 3)):
        for c in range(n + 1):
            correct = [True] * c + [False] * (n - c)
            draws = list(itertools.combinations(correct, k))
            share = sum(any(draw) for draw in draws) / len(draws)
            assert pass_at_k([{"correct": correct}], k) == pytest.approx(share)
    records = [{"correct": [True, False]}, {"correct": [False, False]}]
    assert (pass_at_k(records, 1), pass_at_k(records, 2)) == (0.25, 0.5)


def test_accuracy_counts_the_first_output():
    records = [{"correct": [True, False]}, {"correct": [False, True]}, {"correct": [True, True]}]
    summary = summarise(records)
    assert (summary["accuracy"], summary["correct"], summary["count"]) == (2 / 3, 2, 3)
    assert tuple(summary["interval"]) == wilson_interval(2, 3)
