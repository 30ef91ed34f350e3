"""Every setting with its default and its help text.

YAML recipes and command-line flags are read into these classes by `command_line.py`, which shows
the text under each field in `--help`. Nothing here imports torch.
"""

import math
import os
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Literal

from .errors import UserError
from .kl_schedule import BetaShape, DynamicKL

R1V_SUFFIX = (
    "Output the thinking process in <think> </think> and final answer (number) in "
    "<answer> </answer> tags."
)
"""What R1-V appends to every problem, in training and in evaluation."""

Judging = Literal["strict", "r1v"]
"""The judges by name: the strict one, and R1-V's rules."""

EVALUATION_BATCH_SIZE = 64
"""Items whose prompts an evaluation holds in memory at once unless told otherwise."""


@dataclass
class ModelConfig:
    """Which model is used, and how it is held in memory."""

    model: str = "tiny"
    """The model: `tiny` or `small` (built in), a local folder, or a name on the Hugging Face hub
    such as Qwen/Qwen2-VL-2B-Instruct."""
    lora: bool = False
    """Train LoRA adapters on the language model's linear layers, not all weights; needs peft."""
    lora_rank: int = 32
    """Rank of the LoRA adapters; their scale alpha is twice the rank."""
    load_in_4bit: bool = False
    """Hold the frozen weights in 4 bits (nf4); needs --lora and bitsandbytes."""
    dtype: Literal["auto", "float32", "bfloat16"] = "auto"
    """Data type of weights and matrix products; `auto` is bfloat16 on CUDA, float32 on a CPU."""
    device: str = "auto"
    """Device of the model, such as cpu, cuda or cuda:1; `auto` is cuda if there is a GPU, else
    cpu."""
    recompute: Literal["auto", "all", "none"] = "auto"
    """Which layers run again in the backward pass, which saves memory and takes up to a third more
    time: all of them, which then keep their input alone; none; or as many as the memory plan says
    (auto). The others keep the results of their matrix products and of attention."""
    offload_checkpoints: bool = False
    """Move the stored inputs of layers that are computed again to host memory."""
    fused_layers: bool = True
    """Compute the layers by fused kernels; false takes transformers' own modules."""
    freeze_vision: bool = False
    """Keep the vision tower as it is and train the language model alone, in less time and memory;
    --lora freezes it in any case."""
    max_prompt_tokens: int = 1024
    """Longest prompt, in text and image tokens; a longer one is an error and is never truncated."""
    max_pixels: int = 401_408
    """Largest image as width × height; the default, 401,408 pixels, is 512 image tokens."""
    shrink_images: bool = False
    """Scale images that are larger than --max-pixels down to it, and pad those that are too thin
    for the model, instead of refusing them."""


@dataclass
class TaskConfig:
    """What the model is asked, and where the questions come from."""

    task: str = "counting"
    """The task, which decides which items are drawn: counting, geometry or figures (area and
    perimeter); free, which draws none, is anything whose answers can be verified."""
    data: str = "drawn"
    """Where items come from: `drawn` makes them; otherwise the name of a hub data set, a folder, or
    a parquet, arrow, json, jsonl or csv file (docs/data.md shows the layouts)."""
    data_split: str | None = None
    """Name of the split in --data that is trained on, such as testmini; by default train."""
    data_config: str | None = None
    """Configuration of a data set that has several, such as Accounting of MMMU."""
    columns: dict[str, str] = field(default_factory=dict)
    """Columns of the data by what they hold (images, problem, solution, thinking), where they have
    names that are not recognised, for example '{"problem": "query"}'."""
    image_root: str | None = None
    """Folder from which relative image paths in the data start, and which no path may leave; for
    the test sets superclevr200 and geoqa, the folder that holds R1-V's list and the images."""
    allow_urls: bool = False
    """Download images that the data names by http and https addresses, each at most 20 MiB and for
    60 s, and keep them in the cache. The data then decides which addresses this machine asks for,
    also in its own network: only for data that is trusted this far."""
    bad_rows: Literal["stop", "skip"] = "stop"
    """What happens to rows that cannot be used, which are found before the first step: stop, or
    skip them."""
    system_prompt: str | None = None
    """System message of every prompt; by default that of the model's chat template."""
    prompt_template: str | None = None
    """Jinja template of the user's text, with the columns of the row, for example
    '{{ problem }} Choose from {{ options }}.'; by default the problem and --prompt-suffix."""
    prompt_suffix: str = R1V_SUFFIX
    """What follows the problem, after a space; by default R1-V's words."""
    judge: Judging = "strict"
    """Who judges answers: the strict judge, which reads all of the answer tag, or R1-V's rules, for
    comparison with published figures."""
    difficulty: int = 1
    """Difficulty of drawn items, from 1 (the easiest) upwards."""


@dataclass
class Sampling:
    """How completions are sampled; a model's own generation_config.json is ignored."""

    max_new_tokens: int = 512
    """Longest completion, in tokens."""
    temperature: float = 1.0
    """Number that divides the logits, in sampling and in the loss; 0 is greedy, for evaluation."""
    top_p: float = 1.0
    """Nucleus sampling: draw from the smallest set of tokens with this probability; 1 is off."""
    top_k: int = 0
    """Draw from the k likeliest tokens only; 0 is off."""
    min_p: float = 0.0
    """Draw only tokens with at least this share of the likeliest one's probability; 0 is off."""
    repetition_penalty: float = 1.0
    """Number that makes tokens of the prompt and the completion less likely: it divides their
    positive logits and multiplies their negative ones (Keskar et al., 2019); 1 is off."""
    stop: list[str] = field(default_factory=list)
    """Texts that end a completion and stay in it, for example '["</answer>"]'."""

    @classmethod
    def of(cls, config: "Sampling", **changes: Any) -> "Sampling":
        """The sampling settings that `config` holds among its others, with `changes`."""
        return cls(**{f.name: getattr(config, f.name) for f in fields(cls)} | changes)

    def check_sampling(self) -> None:
        """Raise UserError for values with which nothing can be sampled."""
        usable_temperature = self.temperature == 0 or 1e-3 <= self.temperature < math.inf
        usable_penalty = 0 < self.repetition_penalty < math.inf
        usable_stop = isinstance(self.stop, list) and all(self.stop)
        for name, holds, must in (
            ("max_new_tokens", self.max_new_tokens >= 0, "must not be negative"),
            ("temperature", usable_temperature, "must be 0 or from 0.001 on"),
            ("top_p", 0 < self.top_p <= 1, "must lie in (0, 1]"),
            ("top_k", self.top_k >= 0, "must not be negative (0: off)"),
            ("min_p", 0 <= self.min_p < 1, "must lie in [0, 1)"),
            ("repetition_penalty", usable_penalty, "must be greater than 0 (1: off)"),
            ("stop", usable_stop, "must be a list of texts, none of them empty"),
        ):
            if not holds:
                raise UserError(f"{name} is {getattr(self, name)}, but {must}.")

    @property
    def filters(self) -> bool:
        """Whether anything but the temperature changes which tokens are drawn."""
        return self.top_p < 1 or self.top_k > 0 or self.min_p > 0 or self.repetition_penalty != 1


@dataclass
class RewardConfig:
    """What is rewarded: accuracy + format_weight · format + the extra rewards."""

    format_weight: float = 1.0
    """Weight α of the format reward; the accuracy reward has weight 1."""
    extra_rewards: dict[str, float] = field(default_factory=dict)
    """Weights of further rewards, for example '{"brief": 0.1}': by registered name, as
    package.module:function, or as file.py:function."""
    plugin: str | None = None
    """Python file that registers your own rewards with @reward."""
    reward_seconds: float = 300.0
    """How long a reward function may take for the completions of one step, in seconds."""


@dataclass
class AlgorithmConfig:
    """How the policy learns from its rewards."""

    algo: Literal["grpo-d", "grpo", "sft"] = "grpo-d"
    """Algorithm: GRPO with the schedule of β (grpo-d), GRPO with a constant β (grpo), or supervised
    fine-tuning."""
    preset: Literal["auto", "counting", "geometry"] = "auto"
    """Task whose β_min, β_max, w/t, β and α of the paper are the defaults; `auto` is the task that
    is trained."""
    sft_target: Literal["solution", "answer"] = "solution"
    """What supervised fine-tuning imitates: the reasoning with the answer, or the answer alone,
    which suits data without a column `thinking`."""
    num_generations: int = 8
    """Completions sampled for each prompt: the group size G."""
    beta_min: float = 0.04
    """Lowest KL weight of grpo-d, which is reached at the end of the exploration steps."""
    beta_max: float = 0.1
    """KL weight of grpo-d at the end of training, which starts at the mean of --beta-min and
    --beta-max."""
    explore_fraction: float = 0.3
    """Share of the steps in which the KL weight of grpo-d falls (w/t); it rises in the rest."""
    beta_shape: BetaShape = "grpo-d"
    """Path of the KL weight of grpo-d: the paper's from mean to min to max (grpo-d), from min to
    max (linear-up), from max to min (linear-down), or the paper's path backwards in time
    (reversed)."""
    beta: float = 0.04
    """Constant KL weight of grpo."""
    clip_low: float = 0.2
    """Distance below 1 at which the ratio π/π_old is clipped."""
    clip_high: float = 0.2
    """Distance above 1 at which the ratio π/π_old is clipped."""
    updates_per_batch: int = 1
    """Optimizer steps on each batch of completions: μ in the GRPO paper."""
    importance_cap: float = 0.0
    """Largest importance weight π/π_rollout of a token, which corrects for the difference between
    the kernels and rounding of training and rollout (2 is usual); 0 is off, since the difference is
    small (the metric `rollout_gap_mean`) and the weights cost a forward pass."""
    reference: Literal["resident", "offload", "8bit"] = "resident"
    """Where the reference model of the KL is kept when all weights are trained: on the device
    (resident), in host memory, from which layers are copied ahead of their use (offload), or on the
    device in 8 bits. With --lora the reference is the policy without its adapters and takes no
    memory."""


@dataclass
class OptimizerConfig:
    """How long training takes, how much it handles at once, and how fast it learns."""

    steps: int = 500
    """Number of training steps, each with one batch of prompts."""
    prompts_per_step: int = 16
    """Prompts in the batch of a step; R1-V has 16 from 1 per GPU × 2 accumulated × 8 GPUs."""
    train_samples: int | None = None
    """Train on this many samples only, reshuffled in every epoch; the paper's few-shot counting
    uses 100."""
    tokens_per_microbatch: int | Literal["auto"] = "auto"
    """Most tokens in one forward and backward pass; gradients accumulate over as many passes as a
    batch needs. `auto` takes what fits into memory and is fastest by the memory plan, on a CPU
    4,096 or one prompt with its completion."""
    optimizer: Literal["auto", "adamw", "adamw_exact", "adamw_stochastic", "adamw8bit"] = "auto"
    """Optimizer: PyTorch's AdamW (adamw); AdamW with 8-bit states whose bf16 weights a 16-bit
    remainder makes exact in fp32 (adamw_exact) or are rounded stochastically (adamw_stochastic);
    bitsandbytes' AdamW8bit (adamw8bit). `auto` is adamw_exact if bf16 weights are trained, else
    adamw."""
    learning_rate: float = 1e-6
    """Peak learning rate."""
    lr_schedule: Literal["constant", "linear", "cosine"] = "linear"
    """Learning rate after the warm-up: constant, or decaying to 0 at the last step."""
    warmup_fraction: float = 0.0
    """Share of the steps in which the learning rate rises linearly from 0."""
    weight_decay: float = 0.0
    """Decoupled weight decay, as in AdamW."""
    max_grad_norm: float = 1.0
    """Largest norm of the gradient; a larger gradient is scaled down to it."""


@dataclass
class RunConfig:
    """Where the run writes its results, and how often."""

    output: str | None = None
    """Folder of the run, which must be new; by default runs/<time>-<task>-<algo>-seed<seed>."""
    resume: str | None = None
    """Folder of an earlier run, to continue from its last checkpoint with the settings of its
    config.yaml."""
    seed: int = 0
    """Seed of everything random: the same seed gives the same numbers on the same machine."""
    save_every: int = 50
    """Steps between checkpoints; 0 saves none."""
    eval_samples: int = 200
    """Number of held-out items that are evaluated before and after training; 0 skips evaluation."""
    eval_data: str | None = None
    """Held-out data: like --data, or one of the test sets superclevr200 and geoqa, which need
    --image-root; by default the test split of --data."""
    eval_split: str | None = None
    """Name of the split that is held out, such as validation; by default test, or validation where
    there is no test split. A file that --eval-data names is held out as a whole."""
    loggers: list[Literal["tensorboard", "wandb"]] = field(default_factory=list)
    """Loggers that are written besides metrics.jsonl, for example '[tensorboard]'."""


@dataclass
class TrainConfig(
    RunConfig, OptimizerConfig, AlgorithmConfig, RewardConfig, Sampling, TaskConfig, ModelConfig
):
    """Post-train a vision-language model with GRPO-D, GRPO or supervised fine-tuning."""

    def optimizer_steps(self) -> int:
        """Optimizer steps of the whole run, which are the t of the β schedule."""
        return self.steps * self.updates_per_batch

    def kl_schedule(self) -> DynamicKL:
        """β as a function of the optimizer step; it is constant for `grpo`."""
        low, high = self.beta, self.beta
        if self.algo == "grpo-d":
            low, high = self.beta_min, self.beta_max
        return DynamicKL(low, high, self.optimizer_steps(), self.explore_fraction, self.beta_shape)

    @property
    def reward_weights(self) -> dict[str, float]:
        """Weight of each reward, by the name that it is registered under."""
        return {"accuracy": 1.0, "format": self.format_weight, **self.extra_rewards}

    @property
    def needs_reference(self) -> bool:
        """Whether the loss has a KL term, for which a reference model must be kept."""
        return self.algo != "sft" and self.kl_schedule().beta_max > 0

    @property
    def needs_thinking(self) -> bool:
        """Whether worked solutions are imitated."""
        return self.algo == "sft" and self.sft_target == "solution"

    def check(self) -> None:
        """Raise UserError for values with which no run is possible."""
        for name, value in vars(self).items():
            if name in _POSITIVE and value != "auto" and value <= 0:
                raise UserError(f"{name} is {value}, but must be greater than 0.")
            if name in _NOT_NEGATIVE and value < 0:
                raise UserError(f"{name} is {value}, but must not be negative.")
        if self.algo != "sft" and self.num_generations < 2:
            raise UserError(
                f"num_generations is {self.num_generations}, "
                "but a group needs at least 2 completions."
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
        if self.offload_checkpoints and self.recompute == "none":
            raise UserError(
                "offload_checkpoints is true, but with recompute none no layer's input is stored "
                "to be offloaded: pass --recompute auto or all."
            )
        longest = self.max_prompt_tokens + self.max_new_tokens
        if self.tokens_per_microbatch != "auto" and longest > self.tokens_per_microbatch:
            raise UserError(
                f"tokens_per_microbatch is {self.tokens_per_microbatch}, but one sequence may have "
                f"max_prompt_tokens + max_new_tokens = {longest} tokens: raise the first or lower "
                "the others."
            )
        try:
            self.kl_schedule()
        except ValueError as error:
            raise UserError(f"the KL schedule is impossible: {error}.") from error


_POSITIVE = {
    *("steps", "prompts_per_step", "updates_per_batch", "tokens_per_microbatch"),
    *("max_prompt_tokens", "max_new_tokens", "max_pixels", "lora_rank"),
    *("learning_rate", "max_grad_norm", "temperature", "reward_seconds"),
}
_NOT_NEGATIVE = {
    *("seed", "save_every", "eval_samples", "weight_decay"),
    *("clip_low", "clip_high", "importance_cap"),
}


def cache_folder() -> Path:
    """Return the folder of the built-in models' supervised starts and of downloaded images.

    It is $MR1_FAST_CACHE, or mr1_fast in $XDG_CACHE_HOME, or mr1_fast in ~/.cache.
    """
    base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(os.environ.get("MR1_FAST_CACHE") or Path(base) / "mr1_fast")
