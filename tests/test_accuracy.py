"""How many answers are right: the statistics against values that were worked out otherwise."""

import itertools

import pytest
import tqdm as progress

from mr1_fast import accuracy
from mr1_fast.accuracy import evaluate, pass_at_k, summarise, wilson_interval
from mr1_fast.rollout.engine import Engine
from mr1_fast.rollout.sampling import Sampling
from mr1_fast.seeds import derive_seed
from mr1_fast.tasks import get_task
from mr1_fast.tasks.data import load_examples

from .data.models import tiny_policy


def test_an_evaluation_samples_what_a_call_for_each_batch_samples(monkeypatch):
    """Each batch has the seed of its first item, whatever runs beside it."""
    bars = []

    def bar(**settings):
        bars.append(progress.tqdm(**settings | {"disable": True}))
        monkeypatch.setattr(bars[-1], "update", lambda n: bars.append(n))
        return bars[0]

    monkeypatch.setattr(accuracy, "tqdm", bar)
    policy, examples = tiny_policy(), load_examples("counting", "drawn", "test", 0).all(8)
    sampling, judge = Sampling(5, temperature=1.0), get_task("counting").judge("strict")
    records = evaluate(policy, judge, examples, sampling, 2, seed=7, batch_size=3)
    engine, outputs = Engine(policy.model, policy.processor, policy.encode), []
    for start in (0, 3, 6):
        seed = derive_seed(7, "evaluate", start)
        outputs += engine.generate(examples[start : start + 3], 2, sampling, seed).texts
    assert [text for record in records for text in record["outputs"]] == outputs
    found = [(r["key"], r["question"], r["ground_truth"]) for r in records]
    assert found == [(item.key, item.problem, item.solution) for item in examples]
    assert bars[1:] == [3, 3, 2], "the bar advances with every batch"


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
