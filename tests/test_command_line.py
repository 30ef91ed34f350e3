"""Command lines: where each value comes from, how flags may be spelled, and what is refused.

Reading the settings of a command must load nothing that takes long: HEAVY names it.
"""

import dataclasses
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import mr1_fast
from mr1_fast.command_line import (
    parse_settings,
    parse_train_config,
    prepare_process,
)
from mr1_fast.config import Sampling, TrainConfig
from mr1_fast.errors import UserError
from mr1_fast.evaluate.settings import EvaluateConfig
from mr1_fast.experiment.settings import ExperimentConfig
from mr1_fast.plan.settings import PlanConfig
from mr1_fast.profiles import SFT, TINY
from mr1_fast.resuming import write_config
from mr1_fast.setting_values import shown

RECIPES = sorted((Path(__file__).parents[1] / "recipes").glob("*.yaml"))
HUB = "Qwen/Qwen2-VL-2B-Instruct"

HEAVY = {"torch", "triton", "transformers", "matplotlib", "jsonargparse"}
LIGHT_COMMANDS = [
    "mr1_fast.train",
    "mr1_fast.evaluate",
    "mr1_fast.plan",
    "mr1_fast.experiment",
    "mr1_fast.merge",
]
"""Commands that read their settings before they import anything of HEAVY."""
LIGHT_MODULES = [
    "mr1_fast",
    "mr1_fast.__main__",
    "mr1_fast.command_line",
    "mr1_fast.config",
    "mr1_fast.errors",
    "mr1_fast.evaluate.settings",
    "mr1_fast.experiment.settings",
    "mr1_fast.files",
    "mr1_fast.kl_schedule",
    "mr1_fast.merge.settings",
    "mr1_fast.plan.settings",
    "mr1_fast.push.__main__",
    "mr1_fast.report.__main__",
    "mr1_fast.setting_values",
    "mr1_fast.version",
]


def yaml_file(folder, **values):
    path = folder / "settings.yaml"
    path.write_text(yaml.safe_dump(values))
    return str(path)


def python(*words, **environment):
    """Run Python; returns the finished process with its output as text."""
    environment = {**os.environ, "COLUMNS": "100", **environment}
    command = [sys.executable, *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment, timeout=60)


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
    "spelling",
    [
        ["--lora", "--load-in-4bit"],
        ["--lora", "--load_in_4bit"],
        ["--lora=true", "--load-in-4bit=true"],
        ["--load-in-4bit", "true", "--lora", "True"],
        ["--load-in-4bit", "--lora", "--freeze-vision", "true"],
    ],
)
def test_switches_may_be_bare_or_given_a_value(spelling):
    config = parse_train_config(spelling)
    assert config.lora is config.load_in_4bit is True


def test_a_switch_may_be_turned_off():
    for spelling in (["--fused-layers", "false"], ["--fused_layers=False"]):
        assert parse_train_config(["--model", HUB, *spelling]).fused_layers is False


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


def test_a_number_may_have_a_word_beside_it(tmp_path, capsys, monkeypatch):
    for value in ("auto", 6144):
        path = yaml_file(tmp_path, tokens_per_microbatch=value)
        for argv in ([f"--tokens-per-microbatch={value}"], ["--config", path]):
            config = parse_train_config(["--model", HUB, *argv])
            assert config.tokens_per_microbatch == value
            write_config(config, tmp_path / "config.yaml")
            assert parse_train_config(["--config", str(tmp_path / "config.yaml")]) == config
    monkeypatch.setenv("COLUMNS", "4000")
    with pytest.raises(SystemExit):
        parse_train_config(["--model", HUB, "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert " --tokens-per-microbatch N|auto " in text
    assert "(whole number or auto; default: auto)" in text


def test_there_are_recipes_for_both_tasks_and_for_several_sizes():
    expected = {
        "tiny_counting",
        "tiny_geometry",
        "qwen2vl_2b_counting_24gb",
        "qwen2vl_2b_geometry_24gb",
        "qwen2vl_7b_lora_24gb",
        "qwen3vl_2b_full_24gb",
        "qwen3vl_4b_lora_24gb",
        "qwen3vl_8b_qlora_24gb",
        "qwen3vl_2b_lora_16gb",
        "qwen2_5vl_3b_full_24gb",
        "qwen2_5vl_7b_qlora_24gb",
    }
    assert {path.stem for path in RECIPES} >= expected


@pytest.mark.parametrize("path", RECIPES, ids=lambda path: path.stem)
def test_every_value_of_a_recipe_arrives(path):
    config = parse_train_config(["--config", str(path)])
    values = yaml.safe_load(path.read_text(encoding="utf-8"))
    assert values and {name: getattr(config, name) for name in values} == values
    if config.preset != "auto":
        assert config.preset == config.task


@pytest.mark.parametrize("cls", [TrainConfig, EvaluateConfig, PlanConfig, ExperimentConfig])
def test_every_setting_is_explained_in_help(cls, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "4000")
    with pytest.raises(SystemExit) as stopped:
        parse_settings(cls, ["--help"], prog="python -m mr1_fast.some")
    assert stopped.value.code == 0
    text = " ".join(capsys.readouterr().out.split("options:")[1].split())
    for setting in dataclasses.fields(cls):
        flag = f"--{setting.name.replace('_', '-')}"
        ends = r"\)(?= --| \w+: |$)"  # another flag follows, a group of them, or nothing
        found = re.search(rf" {flag} (\S+) (.*?) \(([^()]*; )?default: (.*?){ends}", text)
        assert found, setting.name
        explained = found[2]
        assert len(explained.split()) >= 3 and explained.endswith("."), setting.name
        if setting.default is not dataclasses.MISSING:
            assert found[4] == shown(getattr(cls(), setting.name)), setting.name
    assert not re.search(r" --[a-z0-9-]*_", text), "flags are spelled with dashes"


def test_help_has_a_group_for_each_part_of_the_settings(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "4000")
    with pytest.raises(SystemExit):
        parse_train_config(["--help"])
    text = capsys.readouterr().out
    titles = ["model", "task", "sampling", "reward", "algorithm", "objective", "kl", "optimizer"]
    assert re.findall(r"^(\w+):$", text, re.M) == ["options", *titles, "run"]
    assert f"sampling:\n  {Sampling.__doc__}" in text
    assert text.index("reward:\n") < text.index("--format-weight") < text.index("algorithm:\n")
    with pytest.raises(SystemExit):
        parse_settings(EvaluateConfig, ["--help"], prog="evaluate")
    own = capsys.readouterr().out.split("evaluate:\n")[1]
    assert "  --samples N" in own
    assert "  --temperature X" not in own, "another default does not make another setting"


def test_help_shows_the_defaults_that_hold_for_the_other_arguments(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("COLUMNS", "4000")
    path = yaml_file(tmp_path, steps=7, model=HUB)
    with pytest.raises(SystemExit):
        parse_train_config(["--help", "--algo", "sft", "--config", path, "--loggers=[wandb]"])
    text = " ".join(capsys.readouterr().out.split())
    for flag, default in (
        ("learning-rate", "2e-05"),
        ("lr-schedule", "cosine"),
        ("steps", "7"),
        ("algo", "sft"),
        ("loggers", '["wandb"]'),
        ("fused-layers", "true"),
        ("tokens-per-microbatch", "auto"),
        ("train-samples", "null"),
    ):
        about_flag = text.split(f" --{flag} ", maxsplit=1)[1].split(" --", maxsplit=1)[0]
        assert f"default: {default})" in about_flag


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


@pytest.mark.parametrize("before, now", [(True, "all"), (False, "none")])
def test_a_file_of_an_earlier_version_is_understood(tmp_path, before, now):
    path = yaml_file(tmp_path, gradient_checkpointing=before)
    assert parse_train_config(["--config", path]).recompute == now
    old = f"steps: 9\ngradient_checkpointing: {before}\ntokens_per_microbatch: 6144\nloggers: []\n"
    (tmp_path / "config.yaml").write_text(old)
    resumed = parse_train_config(["--resume", str(tmp_path)])
    assert (resumed.recompute, resumed.tokens_per_microbatch) == (now, 6144)
    assert parse_train_config(["--resume", str(tmp_path), "--recompute=auto"]).recompute == "auto"


@pytest.mark.parametrize("algo, shape", [("grpo", "constant"), ("grpo-d", "linear-up")])
def test_a_run_of_an_earlier_version_keeps_its_kl_weight(tmp_path, algo, shape):
    """Its GRPO had a constant β, whatever shape stood in its config.yaml."""
    old = dict(output="x", steps=9, algo=algo, preset="auto", num_generations=8, beta=0.03)
    old |= dict(
        beta_min=0.04, beta_max=0.1, explore_fraction=0.3, beta_shape="linear-up", loggers=[]
    )
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(old, sort_keys=False))
    resumed = parse_train_config(["--resume", str(tmp_path)])
    assert (resumed.beta_shape, resumed.beta) == (shape, 0.03)
    betas = [resumed.kl_schedule()(step) for step in (0, 9)]
    assert betas == ([0.03, 0.03] if algo == "grpo" else pytest.approx([0.04, 0.1]))
    write_config(resumed, tmp_path / "config.yaml")  # as a resumed run does
    assert parse_train_config(["--resume", str(tmp_path)]) == resumed


def test_a_file_by_hand_may_give_grpo_any_kl_weight(tmp_path):
    path = yaml_file(tmp_path, algo="grpo", beta_shape="linear-up", beta_max=0.2)
    assert parse_train_config(["--config", path]).beta_shape == "linear-up"


def test_a_value_that_no_earlier_version_had_is_refused(tmp_path):
    path = yaml_file(tmp_path, gradient_checkpointing="some")
    with pytest.raises(UserError, match="recompute is some, but must be one of auto, all, none"):
        parse_train_config(["--config", path])


@pytest.mark.parametrize("flag", ["--gradient-checkpointing", "--gradient_checkpointing=true"])
def test_a_flag_of_an_earlier_version_names_the_one_in_its_place(flag):
    now = "--gradient-checkpointing is now --recompute .all for true, none for false.: see "
    with pytest.raises(UserError, match=now):
        parse_train_config([flag])


def test_resuming_reads_the_settings_of_the_run(tmp_path):
    config = parse_train_config(["--steps=9", "--seed=4", "--output=elsewhere"])
    write_config(config, tmp_path / "config.yaml")
    expected = dataclasses.replace(config, output=str(tmp_path), steps=12)
    for argv in (["--resume", str(tmp_path)], [f"--resume={tmp_path}"]):
        begun_again = parse_train_config([*argv, "--steps=12"])
        assert begun_again == dataclasses.replace(expected, resume="auto")
    (tmp_path / "checkpoints" / "step-000004").mkdir(parents=True)
    resumed = parse_train_config([*argv, "--steps=12"])
    assert resumed == dataclasses.replace(expected, resume=str(tmp_path))


def test_resume_auto_goes_on_where_there_is_a_checkpoint_and_begins_there_otherwise(tmp_path):
    argv = ["--resume=auto", f"--output={tmp_path}", "--steps=12"]
    begun = parse_train_config(argv)
    assert (begun.resume, begun.output) == ("auto", str(tmp_path))
    write_config(dataclasses.replace(begun, seed=4), tmp_path / "config.yaml")
    (tmp_path / "metrics.jsonl").touch()
    (tmp_path / "checkpoints" / ".step-000005.partial").mkdir(parents=True)
    assert parse_train_config(argv) == begun

    (tmp_path / "checkpoints" / "step-000005").mkdir()
    resumed = parse_train_config(argv)
    assert resumed == dataclasses.replace(begun, resume=str(tmp_path), seed=4)

    with pytest.raises(UserError, match="resume is auto, but there is no output: name the"):
        parse_train_config(argv[:1])


IMPOSSIBLE = {
    **{
        f"--{name}=0": f"{name} is 0, but must be at least 1"
        for name in ("steps", "prompts_per_step")
    },
    **{
        f"--{name}=-1": f"{name} is -1, but must be at least 1"
        for name in ("max_new_tokens", "updates_per_batch")
    },
    **{
        f"--{name}=0": f"{name} is 0, but must be at least 1"
        for name in ("tokens_per_microbatch", "lora_rank")
    },
    **{
        f"--{name}=0": f"{name} is 0, but must be at least 1"
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
    "--offload-checkpoints": (
        "offload_checkpoints is true, but with recompute none.*pass --recompute auto or all"
    ),
    "--beta_min=0.5": "KL schedule is impossible.*beta_min=0.5, beta_max=0.1",
    "--target-kl=0": "target_kl is 0.0, but must be greater",
    "--skip-equal-groups=skip": "skip_equal_groups is skip, but must be one of keep, drop, refill",
    "--beta-shape=cosine": ("beta_shape is cosine, but must be one of constant, grpo-d, linear-up"),
    "--explore_fraction=1.5": "KL schedule is impossible.*explore_fraction",
    "--algo=ppo": "algo is ppo, but must be one of grpo-d, grpo, dr-grpo, dapo, gspo, cispo, sft",
    "--preset=chess": "preset is chess, but must be one of auto, counting, geometry",
    "--dtype=float8": "dtype is float8, but must be one of auto, float32, bfloat16",
    "--optimizer=sgd": (
        "optimizer is sgd, but must be one of auto, adamw, adamw_exact, adamw_stochastic, adamw8bit"
    ),
    "--lr_schedule=step": "lr_schedule is step, but must be one of constant, linear, cosine",
    "--loggers=[comet]": "loggers is comet, but must be one of tensorboard, wandb",
    "--loggers=wandb": "loggers is wandb, but must be a list",
    "--tokens-per-microbatch=many": (
        "tokens_per_microbatch is many, but must be a whole number or auto"
    ),
    "--tokens-per-microbatch=100": (
        r"tokens_per_microbatch is 100, but one sequence may have .* = \d+ tokens"
    ),
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
    "--resume=nowhere": (
        "resume is nowhere, but there is no nowhere/config.yaml: name the folder of an earlier run"
    ),
}


@pytest.mark.parametrize("flag, message", IMPOSSIBLE.items(), ids=IMPOSSIBLE)
def test_what_no_run_could_mean_is_told_in_one_sentence(flag, message):
    with pytest.raises(UserError, match=message) as raised:
        parse_train_config([flag])
    assert "\n" not in str(raised.value) and str(raised.value).endswith(".")


@pytest.mark.parametrize(
    "argv, message",
    [
        (
            ["--beta-shape=target-kl", "--task=geometry"],  # whose preset has β_min = 0
            "KL schedule is impossible: beta_min is 0.*never leave: pass --beta-min 0.001",
        ),
        (["--beta-shape=accuracy", "--beta-min=0.5"], "impossible.*beta_min=0.5, beta_max=0.1"),
    ],
)
def test_bounds_that_no_path_of_the_kl_weight_could_keep(argv, message):
    with pytest.raises(UserError, match=message) as raised:
        parse_train_config(argv)
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


@pytest.mark.parametrize("path", ["flag", "yaml"])
@pytest.mark.parametrize(
    "name, text, value",
    [
        ("steps", "1_000", 1000),
        ("learning_rate", "1e-5", 1e-5),
        ("learning_rate", "3", 3.0),
        ("lora", "yes", True),
        ("train_samples", "null", None),
        ("image_root", "null", None),
        ("output", "2026-11-26", "2026-11-26"),
        ("stop", '["</answer>", "1"]', ["</answer>", "1"]),
        ("extra_rewards", '{"brief": 1e-1, long: 2}', {"brief": 0.1, "long": 2.0}),
    ],
)
def test_a_flag_and_a_yaml_file_have_the_same_values(name, text, value, path, tmp_path):
    argv = [f"--{name}={text}"]
    if path == "yaml":
        file = tmp_path / "settings.yaml"
        file.write_text(f"{name}: {text}")
        argv = [f"--config={file}"]
    found = getattr(parse_train_config(argv), name)
    assert found == value and type(found) is type(value)


@pytest.mark.parametrize(
    "line, message",
    [
        ("steps: null", "steps is blank, but must be a whole number"),
        ("steps: true", "steps is true, but must be a whole number"),
        ("lora: 1", "lora is 1, but must be true or false"),
        ("beta: .nan", "beta is NaN, but must be a finite number"),
        ("device: 0", r"device is 0, but must be a text \(write it in quotes\)"),
        ("stop: [1]", r"stop is 1, but must be a text \(write it in quotes\)"),
        ("loggers: wandb", r"loggers is wandb, but must be a list such as '\[a, b\]'"),
        ("extra_rewards: {a: x}", "extra_rewards is x, but must be a finite number"),
        ("extra_rewards: {1: 2}", "extra_rewards is .*, but must be a mapping such as '.*'"),
        ("algo: [sft]", r'algo is \["sft"\], but must be one of grpo-d, grpo, .*, sft'),
    ],
)
def test_a_yaml_value_of_another_type_is_refused(line, message, tmp_path):
    path = tmp_path / "settings.yaml"
    path.write_text(line)
    with pytest.raises(UserError, match=f"{message}: see python -m mr1_fast.train --help.$"):
        parse_train_config(["--config", str(path)])


def test_the_last_of_several_yaml_files_counts_most(tmp_path):
    (tmp_path / "first").write_text("steps: 1\nseed: 3")
    (tmp_path / "second").write_text("steps: 2")
    config = parse_train_config([f"--config={tmp_path / name}" for name in ("first", "second")])
    assert (config.steps, config.seed) == (2, 3)


def test_values_are_not_changed_by_a_profile_that_the_user_contradicts():
    config = parse_train_config(["--algo=sft", "--learning-rate=1e-6", "--model", HUB])
    assert (config.learning_rate, config.lr_schedule) == (1e-6, "cosine")


AFTERWARDS = f"""
import atexit, runpy, sys
atexit.register(lambda: print("loaded:", *sorted({HEAVY!r} & set(sys.modules))))
module, *sys.argv[1:] = sys.argv[1:]
runpy.run_module(module, run_name="__main__", alter_sys=True)
"""


@pytest.mark.parametrize("command", LIGHT_COMMANDS)
@pytest.mark.parametrize("words, status", [("--help", 0), ("--stepz=3", 2), ("--config=faulty", 2)])
def test_settings_are_read_before_anything_heavy_is_loaded(command, words, status, tmp_path):
    path = tmp_path / "faulty.yaml"
    path.write_text("steps: [")
    run = python("-c", AFTERWARDS, command, words.replace("faulty", str(path)))
    assert run.returncode == status, run.stderr
    assert run.stdout.splitlines()[-1].strip() == "loaded:"
    if status:
        assert run.stderr.startswith("error: ") and len(run.stderr.splitlines()) == 1


@pytest.mark.parametrize("module", LIGHT_MODULES)
def test_a_light_module_loads_nothing_heavy(module):
    loaded = f"import sys, {module}; print(sorted({HEAVY!r} & set(sys.modules)))"
    assert python("-c", loaded).stdout == "[]\n"


def test_importing_the_package_leaves_the_process_as_it_is():
    code = (
        "import os; before = dict(os.environ); import mr1_fast; print(before == dict(os.environ))"
    )
    assert python("-c", code).stdout == "True\n"


def test_the_names_of_the_package_are_loaded_on_first_use():
    assert set(mr1_fast.__all__) <= set(dir(mr1_fast))
    for name in mr1_fast.__all__:
        value = getattr(mr1_fast, name)
        assert name == "__version__" or value.__name__ == name
    with pytest.raises(AttributeError, match="no attribute 'grpo_lost'"):
        mr1_fast.grpo_lost  # noqa: B018


@pytest.mark.parametrize(
    "before, after",
    [({}, "3000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "passive"}, None)],
)
def test_a_command_shortens_the_spin_of_waiting_threads(before, after, monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY"):
        monkeypatch.setenv(name, "")  # so that it is restored, whatever is set below
        monkeypatch.delenv(name)
    for name, value in before.items():
        monkeypatch.setenv(name, value)
    prepare_process()
    prepare_process()
    assert os.environ.get("GOMP_SPINCOUNT") == after


def test_mr1_runs_a_command_by_its_name():
    by_name = python("-m", "mr1_fast", "train", "--help")
    assert by_name.returncode == 0
    assert by_name.stdout == python("-m", "mr1_fast.train", "--help").stdout
    refused = python("-m", "mr1_fast", "train", "--steps=many")
    assert refused.returncode == 2
    expected = "error: steps is many, but must be a whole number: see python -m mr1_fast.train"
    assert refused.stderr == f"{expected} --help.\n"


def test_mr1_lists_its_commands():
    listed = python("-m", "mr1_fast", "--help")
    assert listed.returncode == 0
    for name in ("train", "evaluate", "plan", "experiment", "merge", "report", "env"):
        assert re.search(rf"^  {name} +\w+", listed.stdout, re.M)
    for words in ([], ["trian"], ["--stepz"]):
        refused = python("-m", "mr1_fast", *words)
        assert refused.returncode == 2 and refused.stderr.endswith(listed.stdout)
        assert not words or f"{words[0]!r} is no command" in refused.stderr
    assert python("-m", "mr1_fast", "--version").stdout == f"{mr1_fast.__version__}\n"


def test_another_algorithm_than_that_of_a_runs_own_settings_is_told(tmp_path):
    write_config(parse_train_config(["--algo=gspo"]), path := tmp_path / "config.yaml")
    message = f"algo is dapo, but config {path} has all settings of gspo: leave --algo out"
    with pytest.raises(UserError, match=message):
        parse_train_config([f"--config={path}", "--algo=dapo"])
    assert parse_train_config([f"--config={path}", "--algo=gspo"]).ratio == "sequence"
    partly = yaml_file(tmp_path, algo="gspo", clip_high=0.3)
    config = parse_train_config([f"--config={partly}", "--algo=dapo"])
    assert (config.loss_type, config.clip_high) == ("dapo", 0.3)
