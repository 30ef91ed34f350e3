"""The tags of a completion: its format, and the text of its answer tag."""

import pytest

from mr1_fast.rewards import format_reward
from mr1_fast.rewards.format import tagged_answer

from ..data.hostile import example

GOOD = "<think>a\n</think>\n \t<answer>\n3</answer>"


@pytest.mark.parametrize(
    "text",
    [GOOD, "<think>a</think><answer>3</answer>", f"{GOOD}\n", f"\n  {GOOD} \n\n"],
)
def test_both_tags_once_in_order_and_filled_is_the_format(text):
    assert format_reward(text, example("3")) == 1.0


@pytest.mark.parametrize(
    "text",
    [
        "<think></think><answer></answer>",
        "<think> </think><answer> </answer>",
        "<think>a</think><answer></answer>",
        "<think>a</think><answer>\n\u3000</answer>",
        "<think></think><answer>3</answer>",
        "<think>\n</think><answer>3</answer>",
    ],
)
def test_empty_tags_are_no_format(text):
    assert format_reward(text, example("3")) == 0.0


def test_missing_repeated_or_misplaced_tags_are_no_format():
    bad = ["", "3", f"so {GOOD}", f"{GOOD} so", f"{GOOD}<answer>4</answer>", GOOD.upper()]
    bad += [GOOD.replace("\t", "so"), "<answer>3</answer><think>a</think>"]
    bad += ["<think>a<answer>3</think></answer>", "<think>a</think></answer>3<answer>"]
    for tag in ("<think>", "</think>", "<answer>", "</answer>"):
        bad += [GOOD.replace(tag, ""), GOOD.replace(tag, 2 * tag)]
        bad += [GOOD.replace("a\n", tag), GOOD.replace("3", tag)]
    for text in bad:
        assert format_reward(text, example("3")) == 0.0, text


def test_the_answer_is_the_text_of_the_one_tag():
    assert tagged_answer(GOOD) == "\n3"
    assert tagged_answer("<answer></answer>") == ""
    for text in ("3", "<answer>3", "3</answer>", "</answer>3<answer>", GOOD + GOOD):
        assert tagged_answer(text) is None
