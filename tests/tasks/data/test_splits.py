"""Which split is meant: words in names, names of splits, and what is trained on."""

from pathlib import Path

import pytest

from mr1_fast.errors import UserError
from mr1_fast.tasks.data.options import DataOptions
from mr1_fast.tasks.data.splits import choose_split, split_in_name


@pytest.mark.parametrize(
    "path, split",
    [
        ("train.jsonl", "train"),
        ("my_training-2.csv", "train"),
        ("training2.csv", "train"),
        ("val.jsonl", "validation"),
        ("set valid.json", "validation"),
        ("a.dev.jsonl", "validation"),
        ("my_eval.jsonl", "test"),
        ("geoqa_test_prompts.jsonl", "test"),
        ("TEST.parquet", "test"),
        ("evaluation-00000-of-00002.jsonl", "test"),
        ("dev/rows.jsonl", "validation"),
        ("data/train_1/rows.jsonl", "train"),
        ("train/test.jsonl", "test"),
        ("train_test.jsonl", "train"),
        ("latest.jsonl", None),
        ("testmini.jsonl", None),
        ("evaluate.jsonl", None),
        ("constrained/rows.jsonl", None),
    ],
)
def test_split_in_name(path, split):
    assert split_in_name(Path(path)) == split


HELD_OUT = DataOptions(held_out=True)


@pytest.mark.parametrize(
    "found, split, options, chosen",
    [
        (["train", "test"], "test", {}, "test"),
        (["train", "val"], "validation", {}, "val"),
        (["train", "dev", "val"], "val", {}, "val"),
        (["train", "validation"], "dev", {}, "validation"),
        (["training", "eval"], "test", {}, "eval"),
        (["testmini", "test"], "train", {"split": "testmini"}, "testmini"),
        (["testmini", "test"], "testmini", {}, "testmini"),
        (["train", "val"], "test", {"held_out": True}, "val"),
        (["train", "val", "test"], "test", {"held_out": True}, "test"),
        (["train", "val", "test"], "test", {"held_out": True, "split": "val"}, "val"),
        (["dev", "test"], "test", {"held_out": True, "trained": "dev"}, "test"),
        (["validation", "test"], "test", {"held_out": True, "trained": "test"}, "validation"),
    ],
)
def test_choose_split(found, split, options, chosen):
    assert choose_split(found, split, DataOptions(**options), "rows") == chosen


@pytest.mark.parametrize(
    "found, split, options, message",
    [
        (
            ["train"],
            "test",
            {},
            "rows has only the split train: for test, pass other data, .*--eval",
        ),
        (["train", "dev"], "test", {}, "has only the splits train, dev: for test.*--eval-split"),
        (["testmini", "test"], "train", {}, "splits testmini, test: for train.*--data-split"),
        (["train"], "train", {"split": "nine"}, "only the split train: for nine.*--data-split"),
        (
            ["train"],
            "test",
            {"held_out": True, "trained": "train"},
            "only the split train: for test",
        ),
        (["test"], "test", {"held_out": True, "trained": "eval"}, "only the split test: for test"),
        (
            ["train", "test"],
            "test",
            {"held_out": True, "trained": "test", "split": "test"},
            "has the splits train, test, and test is trained on: for test, name another",
        ),
    ],
)
def test_a_missing_split_is_told_with_those_that_are_there(found, split, options, message):
    with pytest.raises(UserError, match=message):
        choose_split(found, split, DataOptions(**options), "rows")
