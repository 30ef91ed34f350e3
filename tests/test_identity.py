"""A run's identity: every setting stays for its whole life or may change, and none is left out."""

import dataclasses
import time
from typing import Literal, get_args, get_origin, get_type_hints

import pytest

from mr1_fast.command_line import parse_train_config
from mr1_fast.config import TrainConfig
from mr1_fast.errors import UserError
from mr1_fast.identity import CHANGEABLE, FIXED, TRAINING_DATA, identity, require_identity
from mr1_fast.resuming import write_config
from mr1_fast.setting_values import shown

FIELDS = [field.name for field in dataclasses.fields(TrainConfig)]
KINDS = get_type_hints(TrainConfig)
OTHERS = {
    **dict(resume="", task="geometry", data="rows.jsonl", model="small", optimizer="adamw"),
    **dict(columns={"problem": "query"}, extra_rewards={"brief": 0.5}, stop=["."]),
    **dict(algo="sft", preset="geometry", loss_type="dapo", tokens_per_microbatch=9999),
    **dict(loggers=["wandb"], num_generations=3, eval_every=7),
    **dict(warmup_fraction=0.25, top_p=0.5, min_p=0.25, explore_fraction=0.25),
    **dict(overlong_penalty=0.5, format_weight=0.5, temperature=0.5),
}
"""Values for settings of which the general rule below makes none."""
NEEDED = {
    "keep_best": ["--eval-every=7"],
    "patience": ["--eval-every=7"],
    "offload_checkpoints": ["--recompute=all"],
}
"""Flags without which others may not change."""


def another(name: str, value: object) -> object:
    """A value of the setting's type that is not this one."""
    if name in OTHERS:
        return OTHERS[name]
    kind = next((each for each in get_args(KINDS[name]) if each is not type(None)), KINDS[name])
    kind = KINDS[name] if get_origin(KINDS[name]) is Literal else kind
    if get_origin(kind) is Literal:
        return next(each for each in get_args(kind) if each != value)
    if kind is bool:
        return not value
    if kind is str:
        return "another"
    return kind((value or 0) + 1)


def test_every_setting_is_in_exactly_one_list():
    assert sorted((*FIXED, *CHANGEABLE)) == sorted(FIELDS)


@pytest.fixture
def begun(tmp_path):
    """A run folder with a checkpoint, which is all that the settings look at."""
    config = parse_train_config(["--output", str(tmp_path)])
    write_config(config, tmp_path / "config.yaml")
    (tmp_path / "checkpoints" / "step-000004").mkdir(parents=True)
    return tmp_path


def test_a_resume_with_another_value_names_setting_both_values_and_the_way_out(begun):
    config = parse_train_config(["--resume", str(begun)])
    started, settings = time.perf_counter(), (begun / "config.yaml").read_bytes()
    for name in FIXED:
        was, new = getattr(config, name), another(name, getattr(config, name))
        assert new != was, name
        flag = f"--{name.replace('_', '-')}={shown(new)}"
        is_auto = FIXED.index(name) % 3 == 0
        argv = ["--resume=auto", "--output"] if is_auto else ["--resume"]
        with pytest.raises(UserError) as told:
            parse_train_config([*argv, str(begun), flag])
        words = str(told.value)
        assert words.startswith(f"{name} is {shown(new)}, but the run in {begun} was begun with ")
        assert shown(was)[:70] in words and words.endswith("begin another run with a new --output.")
    assert time.perf_counter() - started < len(FIXED), "less than a second each"
    assert (begun / "config.yaml").read_bytes() == settings


def test_what_may_change_is_taken(begun):
    for name in set(CHANGEABLE) - {"output", "resume"}:
        new = another(name, getattr(TrainConfig(), name))
        flags = NEEDED.get(name, [])
        config = parse_train_config(
            ["--resume", str(begun), f"--{name.replace('_', '-')}={shown(new)}", *flags]
        )
        assert getattr(config, name) == new, name


def test_the_same_values_again_are_no_change(begun):
    config = parse_train_config(["--resume", str(begun)])
    flags = [
        f"--{name.replace('_', '-')}={'null' if value is None else shown(value)}"
        for name, value in identity(config).items()
    ]
    assert parse_train_config(["--resume", str(begun), *flags]) == config


def test_what_an_earlier_version_has_not_kept_is_not_compared(tmp_path):
    require_identity({"seed": 1, "task": "counting"}, {"task": "counting"}, tmp_path)
    require_identity({"seed": 1}, {}, tmp_path)
    with pytest.raises(UserError, match=r"seed is 1, but the run in .* with 2, .*: write that"):
        require_identity({"seed": 1}, {"seed": 2}, tmp_path, "write that into its config.yaml")


def test_files_may_lie_in_another_place_and_data_are_told_by_their_content(tmp_path):
    begun = TrainConfig(extra_rewards={"/old/place/rew.py:r": 0.5}, data="/old/data.jsonl")
    moved = TrainConfig(extra_rewards={"../new/rew.py:r": 0.5}, data="new.jsonl", model="moved")
    require_identity(identity(moved), identity(begun), tmp_path)
    for other in ({"rew.py:r": 0.25}, {"rew.py:s": 0.5}, {}):
        with pytest.raises(UserError, match="extra_rewards is "):
            found = identity(TrainConfig(extra_rewards=other))
            require_identity(found, identity(begun), tmp_path)
    with pytest.raises(UserError, match=r"the training data is 3 rows .* begun with 4 rows"):
        kept = {TRAINING_DATA: "4 rows (cd)"}
        require_identity({TRAINING_DATA: "3 rows (ab)"}, kept, tmp_path)
