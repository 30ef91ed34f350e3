"""Settings: where each value comes from, how flags may be spelt, and what no run could mean."""

import dataclasses
import re
from pathlib import Path
from typing import get_args

import pytest
import yaml

from mr1_fast.config import (
    SFT,
    TINY,
    AlgorithmConfig,
    ModelConfig,
    OptimizerConfig,
    RewardConfig,
    RunConfig,
    Sampling,
    TaskConfig,
    TrainConfig,
    cache_folder,
    parse_train_config,
    write_config,
)
from mr1_fast.errors import UserError
from mr1_fast.evaluate.settings import EvaluateConfig
from mr1_fast.kl_schedule import BetaShape, DynamicKL

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
HUB = "Qwen/Qwen2-VL-2B-Instruct"


def yaml_file(folder, **values):
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def test_without_arguments_the_tiny_model_counts():
    config = parse_train_config([])
    assert (config.model, config.task, config.data, config.algo) == (
        "tiny",
        "counting",
        "drawn",
        "grpo-d",
    )
    assert {name: getattr(config, name) for name in TINY} == TINY


def test_a_flag_beats_yaml_beats_preset_beats_profile_beats_default(tmp_path):
    default = TrainConfig()
    assert (default.steps, default.beta_max, default.learning_rate) == (500, 0.1, 1e-6)
    # the profile of the tiny model beats that of SFT and the default; a preset the default
    config = parse_train_config(["--task", "geometry"])
    assert (config.steps, config.beta_max, config.learning_rate) == (
        TINY["steps"],
        0.02,
        TINY["learning_rate"],
    )
    assert config.steps != default.steps and config.learning_rate != default.learning_rate
    config = parse_train_config(["--algo=sft"])
    assert (config.learning_rate, config.lr_schedule) == (
        TINY["learning_rate"],
        TINY["lr_schedule"],
    )
    config = parse_train_config(["--algo=sft", "--model", HUB])
    assert {name: getattr(config, name) for name in SFT} == SFT and config.steps == 500
    # YAML beats them, a flag beats YAML, wherever it stands
    path = yaml_file(tmp_path, steps=7, beta_max=0.5, learning_rate=0.25)
    config = parse_train_config(["--task", "geometry", "--config", path])
    assert (config.steps, config.beta_max, config.learning_rate) == (7, 0.5, 0.25)
    assert config.beta_min == 0.0  # of the preset, as YAML is silent about it
    for argv in (["--steps", "3", "--config", path], ["--config", path, "--steps", "3"]):
        config = parse_train_config(["--beta-max=0.75", *argv])
        assert (config.steps, config.beta_max, config.learning_rate) == (3, 0.75, 0.25)


def test_a_task_or_model_named_in_yaml_chooses_preset_and_profile(tmp_path):
    config = parse_train_config(["--config", yaml_file(tmp_path, task="geometry", model=HUB)])
    assert (config.beta_min, config.beta_max, config.beta) == (0.0, 0.02, 0.01)
    assert (config.steps, config.max_new_tokens, config.learning_rate) == (500, 512, 1e-6)


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


@pytest.mark.parametrize(
    "spelling",
    [
        ["--lora", "--load-in-4bit"],
        ["--lora", "--load_in_4bit"],
        ["--lora=true", "--load-in-4bit=true"],
        ["--load-in-4bit", "true", "--lora", "True"],
        ["--load-in-4bit", "--lora", "--gradient-checkpointing", "true"],
    ],
)
def test_switches_may_be_bare_or_given_a_value(spelling):
    config = parse_train_config(spelling)
    assert config.lora is config.load_in_4bit is True


def test_a_switch_may_be_turned_off():
    for spelling in (["--gradient-checkpointing", "false"], ["--gradient_checkpointing=False"]):
        assert parse_train_config(["--model", HUB, *spelling]).gradient_checkpointing is False


def test_values_of_every_kind():
    argv = [
        "--extra-rewards",
        '{"brief": 0.5}',
        "--loggers",
        "[tensorboard]",
        "--train-samples=9",
        "--top-p",
        "0.5",
    ]
    config = parse_train_config([*argv, "--image-root", "a-b/c-d", "--learning-rate", "1e-5"])
    assert (config.extra_rewards, config.loggers) == ({"brief": 0.5}, ["tensorboard"])
    assert (config.train_samples, config.top_p, config.learning_rate) == (9, 0.5, 1e-5)
    assert config.image_root == "a-b/c-d"  # dashes are replaced in names only


def test_there_are_recipes_for_both_tasks_and_both_sizes():
    expected = {
        "tiny_counting",
        "tiny_geometry",
        "qwen2vl_2b_counting_24gb",
        "qwen2vl_2b_geometry_24gb",
    }
    assert {path.stem for path in RECIPES} >= {*expected, "qwen2vl_7b_lora_24gb"}


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_value_of_a_recipe_arrives(path):
    config = parse_train_config(["--config", str(path)])
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert values and {name: getattr(config, name) for name in values} == values
    if config.preset != "auto":
        assert config.preset == config.task
    longest = config.max_prompt_tokens + config.max_new_tokens
    assert config.tokens_per_microbatch >= longest, (
        "a prompt with its completion must fit into a micro-batch"
    )


@pytest.mark.parametrize("cls", [TrainConfig, EvaluateConfig])
def test_every_setting_is_explained_in_help(cls, capsys, monkeypatch):
    from mr1_fast.evaluate import __main__ as evaluate

    monkeypatch.setenv("COLUMNS", "4000")
    monkeypatch.setattr("sys.argv", ["evaluate", "--help"])
    with pytest.raises(SystemExit) as stopped:
        parse_train_config(["--help"]) if cls is TrainConfig else evaluate.main()
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split("options:")[1].split())
    for setting in dataclasses.fields(cls):
        explained = re.search(rf" --{setting.name} (\S+) (.*?) \(type: ", text)
        assert explained and len(explained[2].split()) >= 3 and explained[2].endswith("."), (
            setting.name
        )


def test_written_settings_are_read_back(tmp_path):
    argv = [
        "--task=geometry",
        "--lora",
        "--extra-rewards",
        '{"brief": 0.5}',
        "--loggers=[tensorboard]",
        "--seed=4",
    ]
    config = parse_train_config(
        [*argv, "--learning-rate=1.5e-7", "--output", "a folder: with, signs", "--algo=grpo"]
    )
    write_config(config, tmp_path / "config.yaml")
    assert parse_train_config(["--config", str(tmp_path / "config.yaml")]) == config


def test_resuming_reads_the_settings_of_the_run(tmp_path):
    config = parse_train_config(["--steps=9", "--seed=4", "--output=elsewhere"])
    write_config(config, tmp_path / "config.yaml")
    for argv in (["--resume", str(tmp_path)], [f"--resume={tmp_path}"]):
        resumed = parse_train_config([*argv, "--steps=12"])
        expected = dataclasses.replace(config, resume=str(tmp_path), output=str(tmp_path), steps=12)
        assert resumed == expected


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
        AlgorithmConfig,
        RewardConfig,
        Sampling,
        TaskConfig,
        ModelConfig,
    ]
    names = [setting.name for group in groups for setting in dataclasses.fields(group)]
    assert sorted(names) == sorted(setting.name for setting in dataclasses.fields(TrainConfig))


IMPOSSIBLE = {
    **{
        f"--{name}=0": f"{name} is 0, but must be greater than 0"
        for name in ("steps", "prompts_per_step")
    },
    **{
        f"--{name}=-1": f"{name} is -1, but must be greater"
        for name in ("max_new_tokens", "updates_per_batch")
    },
    **{
        f"--{name}=0": f"{name} is 0.*, but must be greater"
        for name in ("tokens_per_microbatch", "lora_rank")
    },
    **{
        f"--{name}=0": f"{name} is 0.*, but must be greater"
        for name in ("max_pixels", "max_prompt_tokens")
    },
    **{
        f"--{name}=0": f"{name} is 0.0, but must be greater"
        for name in ("learning_rate", "temperature")
    },
    **{
        f"--{name}=-1": f"{name} is -1, but must not be negative"
        for name in ("seed", "save_every", "eval_samples")
    },
    **{
        f"--{name}=-0.5": f"{name} is -0.5, but must not be"
        for name in ("weight_decay", "clip_low", "clip_high")
    },
    "--max_grad_norm=0": "max_grad_norm is 0.0, but must be greater",
    "--num_generations=1": "num_generations is 1, but a group needs at least 2",
    "--top_p=0": r"top_p is 0.0, but must lie in \(0, 1\]",
    "--top_p=1.5": "top_p is 1.5",
    "--warmup_fraction=2": "warmup_fraction is 2.0",
    "--load_in_4bit": "load_in_4bit is true.*add --lora",
    "--offload-checkpoints": "offload_checkpoints is true, but.*add --gradient-checkpointing true",
    "--beta_min=0.5": "KL schedule is impossible.*beta_min=0.5, beta_max=0.1",
    "--beta-shape=cosine": "beta_shape is cosine, but must be one of grpo-d, linear-up, linear-down, reversed",
    "--explore_fraction=1.5": "KL schedule is impossible.*explore_fraction",
    "--algo=ppo": "algo is ppo, but must be one of grpo-d, grpo, sft",
    "--preset=chess": "preset is chess, but must be one of auto, counting, geometry",
    "--dtype=float8": "dtype is float8, but must be one of auto, float32, bfloat16",
    "--optimizer=sgd": "optimizer is sgd, but must be one of auto, adamw, adamw_exact, adamw_stochastic, adamw8bit",
    "--lr_schedule=step": "lr_schedule is step, but must be one of constant, linear, cosine",
    "--loggers=[mlflow]": "loggers is mlflow, but must be one of tensorboard, wandb",
    "--loggers=wandb": "loggers is wandb, but must be a list",
    "--steps=many": "steps is many, but must be a whole number",
    "--train-samples=1.5": "train_samples is 1.5, but must be a whole number",
    "--learning_rate=fast": "learning_rate is fast, but must be a finite number",
    "--temperature=nan": "temperature is nan, but must be a finite number",
    "--beta_max=inf": "beta_max is inf, but must be a finite number",
    "--lora=maybe": "lora is maybe, but must be true or false",
    "--extra_rewards=[1]": "extra_rewards is .*, but must be a mapping",
    "--steps": "argument --steps: expected one argument",
    "--stepz=3": "unrecognized arguments: --stepz=3: see python -m mr1_fast.train --help",
    "--step=3": "unrecognized arguments: --step=3",
    "stray": "unrecognized arguments: stray",
    "--config": "argument --config: expected one argument",
    "--config=nowhere.yaml": "nowhere.yaml",
    "--resume=nowhere": "resume is nowhere, but there is no nowhere/config.yaml: name the folder of an earlier run",
}


@pytest.mark.parametrize("flag, message", IMPOSSIBLE.items(), ids=IMPOSSIBLE)
def test_what_no_run_could_mean_is_told_in_one_sentence(flag, message):
    with pytest.raises(UserError, match=message) as raised:
        parse_train_config([flag])
    assert "\n" not in str(raised.value) and str(raised.value).endswith(".")


def test_sft_needs_no_group():
    assert parse_train_config(["--algo=sft", "--num-generations=1"]).num_generations == 1


FAULTY_YAML = {
    b"stepz: 3": "has 'stepz', which is no setting: see python -m mr1_fast.train --help",
    b"a: 1\nsteps: [": "is not YAML .*line 2",
    b"": "holds no settings",
    b"- steps": "holds no settings",
    b"\xff\xfe\x00": "is not a text file",
}


@pytest.mark.parametrize("content, message", FAULTY_YAML.items())
def test_a_faulty_yaml_file_is_named_in_one_sentence(content, message, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_bytes(content)
    with pytest.raises(UserError, match=f"config {path} {message}") as raised:
        parse_train_config(["--steps=3", "--config", str(path)])
    assert "\n" not in str(raised.value)


def test_a_wrong_value_in_yaml_is_named(tmp_path):
    with pytest.raises(UserError, match="steps is many, but must be a whole number"):
        parse_train_config(["--config", yaml_file(tmp_path, steps="many")])
