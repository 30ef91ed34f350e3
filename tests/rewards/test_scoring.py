"""Scores: group-major and weighted, and one clear sentence about a reward that fails."""

import pytest
import torch

from mr1_fast.errors import UserError
from mr1_fast.rewards import reward, score

from ..data.hostile import example


def test_score_is_group_major_and_weighted():
    completions = ["<think>a</think><answer> 1 </answer>", "2", "<answer> 2 </answer>", "1"]
    total, values = score(
        completions, [example("1"), example("2")], {"accuracy": 1.0, "format": 0.5}
    )
    assert (total.dtype, total.tolist()) == (torch.float32, [[1.5, 0.0], [1.0, 0.0]])
    assert values == {"accuracy": [1.0, 0.0, 1.0, 0.0], "format": [1.0, 0.0, 0.0, 0.0]}
    with pytest.raises(ValueError, match="3 completions"):
        score(completions[:3], [example("1"), example("2")], {"format": 1.0})


def test_a_users_reward_is_one_decorator_away(registry):
    @reward("length")
    def length(completion, item):
        return torch.tensor(len(completion) + len(item.solution))  # a number of any type will do

    assert length("ab", example("3")) == 3  # the decorator leaves the function itself usable
    total, values = score(["ab", "abc"], [example("3")], {"length": 2, "format": 0})
    assert total.tolist() == [[6.0, 8.0]]
    assert values == {"length": [3.0, 4.0], "format": [0.0, 0.0]}  # weight 0 is still computed


NOT_NUMBERS = ("None", "'1'", "[1]", "1j", "torch.ones(2)", "1 / 0", "completion.no_such_thing")
NOT_FINITE = ("float('nan')", "float('inf')", "-float('inf')", "10**400", "1e39")


@pytest.mark.parametrize("code", NOT_NUMBERS + NOT_FINITE)
def test_a_bad_value_or_an_exception_names_the_function(registry, code):
    @reward("odd")
    def my_odd_reward(completion, item):
        return eval(code)

    with pytest.raises(
        UserError, match=r"'odd'.*my_odd_reward.*(finite number|ZeroDivisionError|AttributeError)"
    ):
        score(["a"], [example("3")], {"odd": 0.0})
