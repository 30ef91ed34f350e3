"""The sentence about how much of a run its evaluations are."""

from mr1_fast.config import TrainConfig
from mr1_fast.plan.evaluations import describe_evaluations

SMALL = dict(steps=10, prompts_per_step=4, num_generations=5, eval_samples=10)


def described(items=10, **settings):
    return describe_evaluations(TrainConfig(**{**SMALL, **settings}), items)


def test_evaluations_are_counted_with_their_share_of_the_answers():
    assert described() == (
        "2 evaluations of 10 items (before and after training): 40 answers beside 200 completions "
        "of training, 17% of the sampled tokens if they are equally long"
    )
    on_the_way = "5 evaluations of 10 items (before and after training, 3 on the way): 70 answers"
    assert described(eval_every=3).startswith(f"{on_the_way} beside 200 completions")
    assert "26% of the sampled tokens" in described(eval_every=3)


def test_refilled_groups_make_the_share_smaller():
    refilled = described(skip_equal_groups="refill")
    assert "beside at least 200 completions of training, at most 17% of the sampled" in refilled


def test_the_last_step_is_evaluated_on_the_way_only_to_find_the_best():
    assert "1 on the way" in described(eval_every=5)
    assert "2 on the way" in described(eval_every=5, keep_best=True)
    assert "on the way" not in described(eval_every=10)


def test_supervised_training_samples_nothing_and_no_items_are_no_evaluation():
    assert described(algo="sft").endswith("40 answers")
    assert described(items=0) == described(eval_samples=0) == ""
