"""Defaults of the built-in models, which training and evaluation share."""

import pytest

from mr1_fast.command_line import parse_train_config
from mr1_fast.evaluate.settings import parse as parse_evaluation
from mr1_fast.profiles import BUILT_IN, BUILT_IN_TEXT, PRESETS, TINY


@pytest.mark.parametrize("parse", [parse_train_config, parse_evaluation])
def test_a_model_of_text_alone_is_asked_for_sums_unless_a_task_is_named(parse):
    for model in BUILT_IN:
        task = "arithmetic" if model in BUILT_IN_TEXT else "counting"
        assert parse([f"--model={model}"]).task == task
        assert parse([f"--model={model}", "--task=free"]).task == "free"
    assert parse(["--model=tiny-text", "--task=counting"]).task == "counting"
    assert parse(["--model=elsewhere"]).task == "counting"


@pytest.mark.parametrize("parse", [parse_train_config, parse_evaluation])
def test_answers_may_be_as_long_as_worked_sums_are(parse):
    def longest(*words):
        return parse(list(words)).max_new_tokens

    assert longest() == longest("--model=tiny-text", "--task=free") == TINY["max_new_tokens"]
    assert longest("--task=counting", "--difficulty=3") == TINY["max_new_tokens"]
    assert [longest("--model=tiny-text", f"--difficulty={d}") for d in (1, 2, 3)] == [24, 36, 48]
    assert longest("--task=arithmetic", "--difficulty=2") == 36
    assert longest("--model=tiny-text", "--max-new-tokens=7") == 7


def test_arithmetic_has_the_schedule_of_counting():
    config = parse_train_config(["--model=tiny-text"])
    assert config.beta_max == PRESETS["counting"]["beta_max"] and config.steps == TINY["steps"]
    assert parse_train_config(["--task=arithmetic"]).beta_min == PRESETS["counting"]["beta_min"]
