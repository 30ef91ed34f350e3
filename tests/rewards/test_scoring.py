"""Scores: group-major and weighted, and one clear sentence about a reward that fails."""

import json
import math
from functools import partial

import pytest
import torch

from mr1_fast.command_line import parse_train_config
from mr1_fast.errors import UserError
from mr1_fast.rewards import Verdict, reward, score
from mr1_fast.train import train

from ..data.hostile import example
from .conftest import row


def test_score_is_group_major_and_weighted():
    completions = ["<think>a</think><answer> 1 </answer>", "2", "<answer> 2 </answer>", "1"]
    scores = score(completions, [example("1"), example("2")], {"accuracy": 1.0, "format": 0.5})
    assert scores.total.dtype == torch.float32
    assert scores.total.tolist() == [[1.5, 0.0], [1.0, 0.0]]
    assert scores.parts == {"accuracy": [1.0, 0.0, 1.0, 0.0], "format": [1.0, 0.0, 0.0, 0.0]}
    with pytest.raises(ValueError, match="3 completions"):
        score(completions[:3], [example("1"), example("2")], {"format": 1.0})


def test_accuracy_is_by_the_judge_that_is_given_and_its_reasons_are_kept():
    completions, examples = ["1", "2", "<answer>2</answer>", "3"], [example("1"), example("2")]

    def judge(completion, solution):
        return Verdict(completion == solution, f"{completion} for {solution}")

    scores = score(completions, examples, {"format": 1.0, "accuracy": 2.0}, accuracy=judge)
    assert scores.total.tolist() == [[2.0, 0.0], [0.0, 0.0]]
    assert scores.why == ["1 for 1", "2 for 1", "<answer>2</answer> for 2", "3 for 2"]

    strict = score(completions, examples, {"accuracy": 1.0})
    assert strict.parts == {"accuracy": [0.0, 0.0, 1.0, 0.0]}
    assert strict.why[0] == strict.why[3] == "there is no answer tag"
    assert score(completions, examples, {"format": 1.0}).why == [""] * 4


def test_a_users_reward_is_one_decorator_away(registry):
    @reward("length")
    def length(completion, item):
        return torch.tensor(len(completion) + len(item.solution))  # a number of any type will do

    assert length("ab", example("3")) == 3  # the decorator leaves the function itself usable
    scores = score(["ab", "abc"], [example("3")], {"length": 2, "format": 0})
    assert scores.total.tolist() == [[6.0, 8.0]]
    # weight 0 is still computed, and the order is that of the weights
    assert list(scores.parts.items()) == [("length", [3.0, 4.0]), ("format", [0.0, 0.0])]


def test_none_counts_zero_in_the_sum_and_is_no_part_of_the_mean(registry):
    values = [None, 4.0, math.nan, torch.tensor(2.0)]
    reward("some")(lambda completions, **columns: values)
    reward("none")(lambda completions, **columns: [None] * len(completions))
    scores = score(list("abcd"), [example("1"), example("2")], {"some": 0.5, "none": 1.0})
    assert scores.total.tolist() == [[0.0, 2.0], [0.0, 1.0]]
    assert scores.parts == {"some": [None, 4.0, None, 2.0], "none": [None] * 4}
    assert scores.means() == {"some": 3.0}


NOT_NUMBERS = ("None", "'1'", "[1]", "1j", "torch.ones(2)", "1 / 0", "completion.no_such_thing")
NOT_NUMBERS += ("type('Odd', (), {'__float__': lambda self: {}['x']})()",)
NOT_FINITE = ("float('nan')", "float('inf')", "-float('inf')", "10**400", "1e39")


@pytest.mark.parametrize("form", ["sync", "async"])
@pytest.mark.parametrize("code", NOT_NUMBERS + NOT_FINITE)
def test_a_bad_value_or_an_exception_names_the_function_and_the_row(registry, code, form):
    @reward("sync")
    def my_odd_reward(completion, item):
        return eval(code) if completion == "c" else 0.0

    @reward("async")
    async def my_odd_async_reward(completion, item):
        return my_odd_reward(completion, item)

    message = r"my_odd_.*(finite number|ZeroDivisionError|AttributeError).* at row 2 of data.jsonl"
    with pytest.raises(UserError, match=f"'{form}'.*{message}"):
        score(["a", "b", "c", "d"], [row(1), row(2)], {form: 0.0})


BAD_LISTS = {
    "0.5": "must return a list of 4 numbers.*not 0.5",
    "None": "must return a list of 4 numbers.*not None",
    "'1111'": "must return a list of 4 numbers.*not '1111'",
    "{0: 1, 1: 1, 2: 1, 3: 1}": "must return a list of 4 numbers",
    "torch.ones(())": "must return a list of 4 numbers",
    "[1, 2, 3]": "must return 4 numbers.*not 3",
    "[]": "must return 4 numbers.*not 0",
    "itertools.count()": "must return 4 numbers.*not more",
    "torch.ones(4, 2)": r"must return a finite number.* at row 1 of",
    "[0, 0, '1', 0]": "finite number, not '1', at row 2 of data.jsonl",
    "[0, 0, 0, math.inf]": "finite number, not inf, at row 2 of data.jsonl",
    "[0, 0, 0, 1e39]": r"finite number, not 1e\+39, at row 2 of data.jsonl",
    "[0, 0, [1], 0]": r"finite number, not \[1\], at row 2 of data.jsonl",
    "asyncio.sleep(0, [0, '2', 0, 0])": "finite number, not '2', at row 1 of data.jsonl",
}


@pytest.mark.parametrize("code", BAD_LISTS)
def test_a_bad_list_is_refused(registry, code):
    import asyncio
    import itertools

    names = {"asyncio": asyncio, "itertools": itertools, "math": math, "torch": torch}
    reward("odd")(lambda completions, **columns: eval(code, names))
    with pytest.raises(UserError, match=BAD_LISTS[code]) as raised:
        score(list("abcd"), [row(1), row(2)], {"odd": 1.0})
    assert "'odd'" in str(raised.value)


def test_hostile_completions_reach_both_forms_unchanged(registry):
    hostile = ["", "\0\ud800", "<answer>" * 1000, "{" * 5000, "\u202e{}%s", "9^{9^{9^{9}}}"]
    seen = {}
    reward("one")(lambda completion, item: seen.setdefault("one", []).append(completion) or 0)

    @reward("all")
    def whole(completions, **columns):
        seen["all"] = completions
        return map(len, completions)

    weights = dict.fromkeys(("accuracy", "format", "one", "all"), 1.0)
    scores = score(hostile, [example("3")], weights)
    assert seen == {"one": hostile, "all": hostile}
    assert scores.total.tolist() == [[float(len(text)) for text in hostile]]


def test_a_partial_and_an_object_are_rewards(registry):
    class Shorter:
        def __init__(self, limit):
            self.limit = limit

        def __call__(self, completion, example):
            return len(completion) < self.limit

    def count(letter, completions, factor=1, **columns):
        return [factor * text.count(letter) for text in completions]

    reward("object")(Shorter(3))
    reward("partial")(partial(count, "a", factor=10))
    scores = score(["aa", "banana"], [example("3")], {"object": 1, "partial": 1})
    assert scores.parts == {"object": [1.0, 0.0], "partial": [20.0, 30.0]}


def test_a_run_rewards_by_functions_of_a_file_and_records_why(run_args, tmp_path):
    path = tmp_path / "mine.py"
    path.write_text(
        "async def progress(completions, completion_ids, trainer_state, solution):\n"
        "    assert len(completions) == len(completion_ids) == len(solution) == 6\n"
        "    assert trainer_state.max_steps == 2\n"
        "    step = trainer_state.global_step\n"
        "    return [None, *(step + len(ids) / 10 for ids in completion_ids[1:])]"
    )
    name = f"{path}:progress"
    weights = {"letters": 1.0, name: 0.5}
    folder = train(
        parse_train_config(
            run_args(tmp_path / "run", steps=2, eval_samples=0, extra_rewards=weights)
        )
    )
    metrics = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    records = [json.loads(line) for line in (folder / "completions.jsonl").read_text().splitlines()]
    for step in range(2):
        samples = [s for r in records if r["step"] == step for s in r["completions"]]
        values = [sample[name] for sample in samples]
        assert values[0] is None and all(step < value < step + 1 for value in values[1:])
        assert metrics[step][name] == pytest.approx(sum(values[1:]) / 5)
        for sample in samples:
            total = sample["accuracy"] + sample["format"] + sample["letters"]
            assert sample["reward"] == pytest.approx(total + 0.5 * (sample[name] or 0.0))
            assert "answer tag" in sample["why"]
            assert sample["reason"] in ("eos", "length")


def test_a_reward_that_hangs_ends_a_run_with_the_row(run_args, tmp_path):
    path = tmp_path / "hangs.py"
    path.write_text("import time\ndef wait(completion, example): time.sleep(20); return 0")
    config = parse_train_config(
        run_args(
            tmp_path / "run",
            eval_samples=0,
            reward_seconds=0.2,
            extra_rewards={f"{path}:wait": 1.0},
        )
    )
    with pytest.raises(UserError, match=r"after 0.2 seconds, at example '.*raise --reward-seconds"):
        train(config)
