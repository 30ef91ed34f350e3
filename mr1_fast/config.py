"""Every setting, its default and its help text; YAML recipes and command-line flags are read into these classes.

A value is looked up in this order: command-line flag, YAML file (`--config`), preset of the task, profile of the
model (the tiny one) and algorithm, the defaults below (R1-V's, which the paper inherits).
"""

import dataclasses
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

import yaml
from jsonargparse import ArgumentError, ArgumentParser, set_parsing_settings

from .errors import UserError
from .kl_schedule import BetaShape, DynamicKL
from .rollout.sampling import Sampling

set_parsing_settings(docstring_parse_attribute_docstrings=True)
Config = TypeVar("Config")

PRESETS = {
    "counting": dict(
        beta_min=0.04, beta_max=0.1, explore_fraction=0.3, beta=0.04, format_weight=1.0
    ),
    "geometry": dict(
        beta_min=0.0, beta_max=0.02, explore_fraction=0.3, beta=0.01, format_weight=1.0
    ),
}
PRESETS["figures"] = PRESETS["geometry"]
"""The paper's β_min, β_max, w/t, the constant β of its GRPO baseline, and α, by task."""

BUILT_IN = ("tiny", "small")
"""Names of the models that are made without downloads (model/tiny.py)."""

TINY = dict(
    max_new_tokens=24,
    learning_rate=2e-4,
    lr_schedule="constant",
    warmup_fraction=0.04,
    steps=120,
    tokens_per_microbatch=16_384,
    gradient_checkpointing=False,
    save_every=25,
    eval_samples=400,
)
"""Profile of the built-in models; the tiny one learns in two minutes on a CPU."""

SFT = dict(learning_rate=2e-5, lr_schedule="cosine", warmup_fraction=0.1)
"""R1-V's settings for supervised fine-tuning."""


@dataclass
class ModelConfig:
    """Which model, and how it is held in memory."""

    model: str = "tiny"
    """`tiny` or `small` (built in), a local folder, or a hub name such as Qwen/Qwen2-VL-2B-Instruct."""
    lora: bool = False
    """Train LoRA adapters on every linear layer of the language model instead of all weights (needs peft)."""
    lora_rank: int = 32
    """Rank of the adapters; their scale alpha is twice the rank."""
    load_in_4bit: bool = False
    """Hold the frozen weights in 4 bits (nf4; needs bitsandbytes, and --lora)."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Weights and matrix products; auto is bfloat16 on CUDA and float32 on CPU."""
    device: str = "auto"
    """Where the model lives; auto is cuda where there is one, else cpu."""
    gradient_checkpointing: bool = True
    """Recompute each layer's activations in the backward pass instead of storing them."""
    offload_checkpoints: bool = False
    """Keep what is stored for that, each layer's input, in host memory."""
    max_prompt_tokens: int = 1024
    """Longest allowed prompt, in text and image tokens; a longer one is an error, never cut."""
    max_pixels: int = 401_408
    """Largest allowed image, width × height (401,408 pixels are 512 image tokens)."""
    shrink_images: bool = False
    """Scale larger images down to max_pixels instead of refusing them."""


@dataclass
class TaskConfig:
    """What is asked."""

    task: str = "counting"
    """counting, geometry or figures (area and perimeter): how outputs are judged, and what is drawn."""
    data: str = "drawn"
    """`drawn`, or a hub name, folder, parquet or jsonl file with columns image, problem, solution (SFT: thinking)."""
    image_root: str | None = None
    """Folder that relative image paths start from; for superclevr200 and geoqa: with R1-V's list and the images."""
    difficulty: int = 1
    """Difficulty of drawn items: 1 (easiest) and up."""


@dataclass
class RewardConfig:
    """What is rewarded: accuracy + format_weight · format + extra rewards."""

    format_weight: float = 1.0
    """α, the weight of the format reward."""
    extra_rewards: dict[str, float] = field(default_factory=dict)
    """Weights of further registered rewards by name, for example '{"brief": 0.1}'."""
    plugin: str | None = None
    """Python file with your own @reward functions."""


@dataclass
class AlgorithmConfig:
    """How the policy is updated."""

    algo: Literal["grpo-d", "grpo", "sft"] = "grpo-d"
    """GRPO with the β schedule, GRPO with constant β, or supervised fine-tuning."""
    preset: Literal["auto", "counting", "geometry"] = "auto"
    """The paper's β_min, β_max, w/t, β and α for a task; auto is the task's own."""
    sft_target: Literal["solution", "answer"] = "solution"
    """sft: imitate reasoning and answer, or the answer alone, for data that has no `thinking`."""
    num_generations: int = 8
    """G, completions sampled per prompt."""
    beta_min: float = 0.04
    """grpo-d: lowest KL weight, reached after the exploration steps."""
    beta_max: float = 0.1
    """grpo-d: KL weight at the end; training starts at the mean of both."""
    explore_fraction: float = 0.3
    """grpo-d: w/t, the share of the steps in which β falls."""
    beta_shape: BetaShape = "grpo-d"
    """grpo-d: β's path: the paper's mean → min → max; min → max; max → min; or the paper's backwards in time."""
    beta: float = 0.04
    """grpo: the constant KL weight."""
    clip_low: float = 0.2
    """The ratio π/π_old is clipped below 1 − clip_low."""
    clip_high: float = 0.2
    """The ratio π/π_old is clipped above 1 + clip_high."""
    updates_per_batch: int = 1
    """μ, optimizer steps on each batch of completions."""
    importance_cap: float = 0.0
    """Weigh each token by π/π_rollout, cut off at this (2 is usual), for what kernels and rounding of training and
    rollout differ by; 0 is off, since the difference is small (`rollout_gap_mean`), and it takes a forward pass."""
    reference: Literal["resident", "offload", "8bit"] = "resident"
    """Where the KL's reference is kept when all weights are trained: on the device, in host memory (layers are streamed
    ahead of their use), or on the device in 8 bits. With --lora it is the policy without its adapters, for free."""


@dataclass
class OptimizerConfig:
    """How long, how much at once, and how fast."""

    steps: int = 500
    """Batches of prompts to train on."""
    prompts_per_step: int = 16
    """Prompts in a batch (R1-V: 1 per GPU × 2 accumulated × 8 GPUs)."""
    train_samples: int | None = None
    """Train on this many samples only, reshuffled every epoch (the paper's few-shot counting uses 100)."""
    tokens_per_microbatch: int = 4096
    """Tokens in one forward and backward; gradients accumulate over as many as a batch needs."""
    optimizer: Literal["auto", "adamw", "adamw_exact", "adamw_stochastic", "adamw8bit"] = "auto"
    """PyTorch's AdamW; 8-bit states with bf16 weights that are exact in fp32 through a 16-bit remainder, or that are
    rounded stochastically; bitsandbytes' AdamW8bit. auto is adamw_exact where bf16 weights are trained, else adamw."""
    learning_rate: float = 1e-6
    """Peak learning rate."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """After the warm-up: constant, or a decay to 0 at the last step."""
    warmup_fraction: float = 0.0
    """Share of the steps in which the learning rate rises from 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay."""
    max_grad_norm: float = 1.0
    """Gradients are scaled down to this norm."""


@dataclass
class RunConfig:
    """Where the run writes, and how often."""

    output: str | None = None
    """Run folder; must be new. Default: runs/<time>-<task>-<algo>-seed<seed>."""
    resume: str | None = None
    """Run folder to continue from its last checkpoint, with its own config.yaml."""
    seed: int = 0
    """Everything random derives from it: same seed, same numbers on the same machine."""
    save_every: int = 50
    """Steps between checkpoints; 0 keeps none."""
    eval_samples: int = 200
    """Held-out items evaluated before and after training; 0 skips evaluation."""
    eval_data: str | None = None
    """Held-out data, also superclevr200 or geoqa (needs --image-root); default: the test split of --data."""
    loggers: list[Literal["tensorboard", "wandb"]] = field(default_factory=list)
    """Loggers to write besides metrics.jsonl, for example '[tensorboard]'."""


@dataclass
class TrainConfig(
    RunConfig, OptimizerConfig, AlgorithmConfig, RewardConfig, Sampling, TaskConfig, ModelConfig
):
    """All settings of `python -m mr1_fast.train`."""

    def optimizer_steps(self) -> int:
        """Optimizer steps of the whole run: the t of the β schedule."""
        return self.steps * self.updates_per_batch

    @property
    def reward_weights(self) -> dict[str, float]:
        """Weight of each reward, by its registered name."""
        return {"accuracy": 1.0, "format": self.format_weight, **self.extra_rewards}

    @property
    def needs_reference(self) -> bool:
        """Whether the loss has a KL term, which compares the policy with a reference."""
        return self.algo != "sft" and self.kl_schedule().beta_max > 0

    def kl_schedule(self) -> DynamicKL:
        """β as a function of the optimizer step; constant for `grpo`."""
        low, high = (
            (self.beta_min, self.beta_max) if self.algo == "grpo-d" else (self.beta, self.beta)
        )
        return DynamicKL(low, high, self.optimizer_steps(), self.explore_fraction, self.beta_shape)

    def check(self) -> None:
        """Raise UserError for values that no run could mean."""
        positive = [
            "steps",
            "prompts_per_step",
            "tokens_per_microbatch",
            "max_new_tokens",
            "updates_per_batch",
        ]
        positive += [
            "max_pixels",
            "max_prompt_tokens",
            "lora_rank",
            "learning_rate",
            "max_grad_norm",
            "temperature",
        ]
        not_negative = [
            "seed",
            "save_every",
            "eval_samples",
            "weight_decay",
            "clip_low",
            "clip_high",
            "importance_cap",
        ]
        for name, value in vars(self).items():
            if name in positive and value <= 0:
                raise UserError(f"{name} is {value}, but must be greater than 0.")
            if name in not_negative and value < 0:
                raise UserError(f"{name} is {value}, but must not be negative.")
        if self.algo != "sft" and self.num_generations < 2:
            raise UserError(
                f"num_generations is {self.num_generations}, but a group needs at least 2 completions."
            )
        self.check_sampling()
        if 0 < self.importance_cap < 1:
            raise UserError(
                f"importance_cap is {self.importance_cap}, but must be 0 (off) or at least 1."
            )
        if not 0 <= self.warmup_fraction <= 1:
            raise UserError(f"warmup_fraction is {self.warmup_fraction}, but must lie in [0, 1].")
        if self.load_in_4bit and not self.lora:
            raise UserError(
                "load_in_4bit is true, but 4-bit weights cannot be trained themselves: add --lora."
            )
        if self.offload_checkpoints and not self.gradient_checkpointing:
            raise UserError(
                "offload_checkpoints is true, but there are none: add --gradient-checkpointing true."
            )
        longest = self.max_prompt_tokens + self.max_new_tokens
        if longest > self.tokens_per_microbatch:
            raise UserError(
                f"tokens_per_microbatch is {self.tokens_per_microbatch}, but one sequence may have max_prompt_tokens + "
                f"max_new_tokens = {longest} tokens: raise the first or lower the others."
            )
        try:
            self.kl_schedule()
        except ValueError as error:
            raise UserError(f"the KL schedule is impossible: {error}.") from error


def parse_train_config(argv: list[str]) -> TrainConfig:
    """The settings of a training run from command-line arguments; UserError for a bad one."""
    resume = _flag_value(argv, "--resume")
    if resume is not None:
        saved = Path(resume) / "config.yaml"
        if not saved.is_file():
            raise UserError(
                f"resume is {resume}, but there is no {saved}: name the folder of an earlier run."
            )
        argv = ["--config", str(saved), *argv, "--output", resume]
    config = parse_config(
        TrainConfig, argv, prog="python -m mr1_fast.train", profile=profile_defaults
    )
    config.check()
    return config


def parse_config(cls: type[Config], argv: list[str], prog: str, profile=None) -> Config:
    """An instance of the dataclass `cls` from flags and `--config` files; `profile(parsed)` gives further defaults."""
    parser = ArgumentParser(
        prog=prog, exit_on_error=False, description=cls.__doc__, allow_abbrev=False
    )
    parser.add_argument(
        "--config", action="config", help="YAML file with any of the settings below"
    )
    parser.add_class_arguments(cls)
    files, flags = _take_config_files(_normalised(argv, cls))
    for path in files:
        _check_yaml(path, cls, prog)
    argv = [
        f"--config={path}" for path in files
    ] + flags  # the parser lets the last value win: flags come last
    try:
        if (
            profile is not None
        ):  # first, so that --help shows the defaults that hold for these arguments
            known = parser.parse_args([word for word in argv if word not in ("-h", "--help")])
            parser.set_defaults(profile(known))
        parsed = parser.parse_args(argv)
    except (ArgumentError, TypeError) as error:
        raise UserError(f"{_in_plain_words(error)}: see {prog} --help.") from error
    return cls(**{f.name: getattr(parsed, f.name) for f in dataclasses.fields(cls)})


def write_config(config: object, path: Path) -> None:
    """Write the settings as YAML that `--config` reads back."""
    values = {name: value for name, value in vars(config).items() if name != "resume"}
    path.write_text(yaml.safe_dump(values, sort_keys=False))


def cache_folder() -> Path:
    """Where the tiny model's supervised start is kept: $MR1_FAST_CACHE, or mr1_fast under the user's cache."""
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MR1_FAST_CACHE") or Path(base) / "mr1_fast")


def profile_defaults(parsed) -> dict:
    """Defaults of the task's preset, the algorithm and the tiny model, for settings parsed so far."""
    preset = parsed.task if parsed.preset == "auto" else parsed.preset
    defaults = dict(PRESETS.get(preset, {}))
    if parsed.algo == "sft":
        defaults |= SFT
    if parsed.model in BUILT_IN:
        defaults |= TINY
    return defaults


def _normalised(argv: list[str], cls: type) -> list[str]:
    """`--load-in-4bit` as `--load_in_4bit true`: dashes are as good as underscores, and a bare switch means true."""
    switches = {f"--{f.name}" for f in dataclasses.fields(cls) if f.type is bool}
    result = []
    for position, word in enumerate(argv):
        if word.startswith("--"):
            name, equals, value = word.partition("=")
            word = "--" + name[2:].replace("-", "_") + equals + value
        result.append(word)
        following = argv[position + 1] if position + 1 < len(argv) else "--"
        if word in switches and following.lower() not in ("true", "false"):
            result.append("true")
    return result


def _take_config_files(argv: list[str]) -> tuple[list[str], list[str]]:
    """The path of every `--config`, and the other words."""
    files, others, words = [], [], iter(argv)
    for word in words:
        if word.startswith("--config="):
            files.append(word.partition("=")[2])
        elif word == "--config" and (path := next(words, None)) is not None:
            files.append(path)
        else:
            others.append(word)
    return files, others


def _check_yaml(path: str, cls: type, prog: str) -> None:
    """Raise UserError unless the file holds settings of `cls`; the parser's own messages do not name the file."""
    try:
        values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(
            f"config {path} cannot be read ({error.strerror}): check the path."
        ) from error
    except ValueError as error:
        raise UserError(f"config {path} is not a text file ({error}): choose another.") from error
    except yaml.YAMLError as error:
        reason = " ".join(str(error).replace('in "<unicode string>", ', "").split())
        raise UserError(f"config {path} is not YAML ({reason}): correct it.") from error
    if not isinstance(values, dict):
        raise UserError(
            f"config {path} holds no settings: write a line such as `steps: 100` for each."
        )
    known = {f.name for f in dataclasses.fields(cls)}
    for name in values:
        if name not in known:
            raise UserError(f"config {path} has {name!r}, which is no setting: see {prog} --help.")


def _in_plain_words(error: Exception) -> str:
    """`algo is ppo, but must be one of grpo-d, grpo, sft` out of the parser's message about a value."""
    text = " ".join(str(error).split()).rstrip(".")
    found = re.search(
        r"Parser key \"(\w+)\": .*?Expected a (?:typing\.Literal\[(.*?)\]|<class '(\w+)'>).* value: (.*)",
        text,
    )
    if not found:
        return text
    name, choices, kind, value = found.groups()
    kinds = {"int": "a whole number", "float": "a finite number", "bool": "true or false"}
    kinds |= {"dict": "a mapping such as '{\"name\": 0.1}'", "list": "a list such as '[a, b]'"}
    expected = f"one of {choices.replace(chr(39), '')}" if choices else kinds.get(kind, kind)
    return f"{name} is {value}, but must be {expected}"


def _flag_value(argv: list[str], flag: str) -> str | None:
    for position, word in enumerate(argv):
        if word.startswith(f"{flag}="):
            return word.partition("=")[2]
        if word == flag and position + 1 < len(argv):
            return argv[position + 1]
    return None
