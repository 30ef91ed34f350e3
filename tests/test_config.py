"""Settings: the paper's presets, the schedule of β, and what several stages ask of them."""

import dataclasses
import re
from pathlib import Path
from typing import get_args

import pytest

from mr1_fast.command_line import parse_train_config
from mr1_fast.config import (
    AlgorithmConfig,
    ModelConfig,
    ObjectiveConfig,
    OptimizerConfig,
    RewardConfig,
    RunConfig,
    Sampling,
    TaskConfig,
    TrainConfig,
    cache_folder,
)
from mr1_fast.config.objective import KLConfig
from mr1_fast.errors import UserError
from mr1_fast.kl_schedule import AccuracyKL, BetaShape, DynamicKL, TargetKL
from mr1_fast.plan.settings import parse
from mr1_fast.rollout import sampling


@pytest.mark.parametrize(
    "argv, low, high, constant",
    [
        ([], 0.04, 0.1, 0.04),
        (["--task=geometry"], 0.0, 0.02, 0.01),
        (["--task=geometry", "--preset=counting"], 0.04, 0.1, 0.04),
        (["--preset=geometry"], 0.0, 0.02, 0.01),
    ],
)
def test_presets_carry_the_numbers_of_the_paper(argv, low, high, constant):
    argv = [*argv, "--steps=100"]
    config = parse_train_config(argv)
    assert (config.beta_min, config.beta_max, config.explore_fraction) == (low, high, 0.3)
    assert (config.beta, config.format_weight) == (constant, 1.0)
    schedule = config.kl_schedule()
    assert (schedule(0), schedule(30), schedule(100)) == (
        pytest.approx((low + high) / 2),
        pytest.approx(low),
        pytest.approx(high),
    )
    plain = parse_train_config([*argv, "--algo=grpo"]).kl_schedule()
    assert plain(0) == plain(50) == plain(100) == constant


def test_the_schedule_counts_optimizer_steps():
    config = parse_train_config(["--steps=10", "--updates-per-batch=3"])
    assert config.optimizer_steps() == config.kl_schedule().total_steps == 30


@pytest.mark.parametrize("shape", get_args(BetaShape))
def test_the_schedule_has_the_shape_that_is_set(shape):
    config = parse_train_config([f"--beta-shape={shape}", "--steps=10"])
    assert config.kl_schedule() == DynamicKL(0.04, 0.1, 10, 0.3, shape)
    assert parse_train_config(["--steps=10"]).kl_schedule().shape == "grpo-d"


def test_feedback_paths_keep_the_bounds_and_the_target_that_are_set():
    by_accuracy = parse_train_config(["--beta-shape=accuracy", "--beta-max=0.3"]).kl_schedule()
    by_accuracy.observe_accuracy(1.0)
    assert isinstance(by_accuracy, AccuracyKL) and by_accuracy(0) == pytest.approx(0.3)
    config = parse_train_config(["--beta-shape=target-kl", "--beta-max=0.3", "--target-kl=0.02"])
    controller = config.kl_schedule()
    assert isinstance(controller, TargetKL)
    assert (controller(0), controller.target) == (pytest.approx(0.17), 0.02)


@pytest.mark.parametrize("variable", ["MR1_FAST_CACHE", "XDG_CACHE_HOME", None])
def test_cache_folder(variable, monkeypatch, tmp_path):
    monkeypatch.delenv("MR1_FAST_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    if variable:
        monkeypatch.setenv(variable, str(tmp_path))
    expected = {"MR1_FAST_CACHE": tmp_path, "XDG_CACHE_HOME": tmp_path / "mr1_fast"}
    assert cache_folder() == expected.get(variable, Path.home() / ".cache" / "mr1_fast")


def test_every_setting_belongs_to_one_group():
    groups = [
        RunConfig,
        OptimizerConfig,
        KLConfig,
        ObjectiveConfig,
        AlgorithmConfig,
        RewardConfig,
        Sampling,
        TaskConfig,
        ModelConfig,
    ]
    names = [setting.name for group in groups for setting in dataclasses.fields(group)]
    assert sorted(names) == sorted(setting.name for setting in dataclasses.fields(TrainConfig))


@pytest.mark.parametrize(
    "settings, needed",
    [
        ({"algo": "grpo-d"}, True),
        ({"algo": "grpo-d", "beta_min": 0.0, "beta_max": 0.0, "beta": 0.5}, False),
        ({"algo": "grpo"}, True),
        ({"algo": "grpo", "beta": 0.0, "beta_max": 0.5}, False),
        ({"algo": "sft"}, False),
        ({"beta_shape": "accuracy", "beta_min": 0.0}, True),
        ({"beta_shape": "accuracy", "beta_min": 0.0, "beta_max": 0.0}, False),
        ({"algo": "dapo"}, False),
        ({"algo": "dapo", "beta_shape": "target-kl"}, True),
    ],
)
def test_a_reference_is_needed_where_the_loss_has_a_kl_term(settings, needed):
    assert TrainConfig(**settings).needs_reference is needed


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"surrogate": "cispo"}, "surrogate cispo is averaged over all tokens of the step"),
        ({"algo": "dapo", "surrogate": "sapo"}, "averaged over the tokens of each sequence, but"),
        ({"loss_type": "luspo"}, "but ratio is token: pass --ratio sequence"),
        ({"algo": "cispo", "clip_delta": 9.0}, "clip_delta bounds the ratio of surrogate clip"),
        ({"clip_delta": 0.5}, "clip_delta is 0.5, a bound on the ratio itself, but must be above"),
        ({"overlong_penalty": 1.5}, "overlong_penalty is 1.5, but must lie in [0, 1]"),
        ({"algo": "dapo", "extra_rewards": {"overlong": 1.0}}, "choose another name, or pass"),
        ({"entropy_coefficient": -0.1}, "entropy_coefficient is -0.1, but must not be negative"),
    ],
)
def test_an_objective_that_does_not_exist_is_refused(settings, message):
    with pytest.raises(UserError, match=re.escape(message)):
        TrainConfig(**settings).check()


def test_float16_is_for_adapters_alone():
    TrainConfig(dtype="float16", lora=True).check()
    message = "dtype is float16, in which small updates .* add --lora, .* or pass --dtype float32"
    with pytest.raises(UserError, match=message):
        TrainConfig(dtype="float16").check()
    TrainConfig().check()
    with pytest.raises(UserError, match="dtype is auto, here float16, in which"):
        TrainConfig().check_dtype("float16")


def test_a_setting_that_is_given_counts_more_than_its_algorithm():
    config = parse_train_config(["--algo=dapo", "--clip-high=0.3", "--task=geometry"])
    found = (config.loss_type, config.clip_low, config.clip_high, config.overlong_penalty)
    assert found == ("dapo", 0.2, 0.3, 0.2)
    assert config.beta == 0 and not config.needs_reference  # not the paper's β of GRPO


def test_sampling_settings_have_one_definition():
    assert sampling.Sampling is Sampling
    config = TrainConfig(top_k=7, temperature=0.5)
    assert Sampling.of(config, temperature=0.0) == Sampling(top_k=7, temperature=0.0)


EXCLUDED = {
    "--load-in-4bit --lora": "weights in 4 bits cannot be cut: pass --sharding none or optimizer",
    "--reference=8bit": "8bit, but with --sharding full the .*: pass --reference resident",
    "--reference=offload": "offload, but with --sharding full the .*: pass --reference resident",
}


@pytest.mark.parametrize("excluded", EXCLUDED)
def test_weights_in_parts_exclude_settings_where_there_are_several_processes(excluded, monkeypatch):
    argv = ["--model=tiny", "--sharding=full", *excluded.split()]
    parse_train_config(argv)
    parse(argv)
    with pytest.raises(UserError, match=EXCLUDED[excluded]):
        parse([*argv, "--gpus=2"])
    start_processes(monkeypatch, 2)
    with pytest.raises(UserError, match=EXCLUDED[excluded]):
        parse_train_config(argv)
    for allowed in ("--sharding=optimizer", "--reference=resident --load-in-4bit=false"):
        parse_train_config([*argv, *allowed.split()])


def test_every_process_needs_a_prompt(monkeypatch):
    start_processes(monkeypatch, 3)
    told = (
        "^prompts_per_step is 2, but there are 3 processes, each of which needs a prompt: raise "
        "--prompts-per-step or lower --nproc-per-node.$"
    )
    with pytest.raises(UserError, match=told):
        parse_train_config(["--prompts-per-step=2"])
    assert parse_train_config(["--prompts-per-step=3"]).prompts_per_step == 3


def start_processes(monkeypatch, size):
    """Let this process be the first of several ones of torchrun."""
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", str(size))
