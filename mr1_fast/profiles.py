"""Defaults that depend on other settings: on the task, the algorithm and the model."""

from typing import Any

from .config import TaskConfig, TrainConfig
from .config.model import BUILT_IN
from .config.objective import ALGORITHMS

PRESETS = {
    "counting": dict(
        beta_min=0.04, beta_max=0.1, explore_fraction=0.3, beta=0.04, format_weight=1.0
    ),
    "geometry": dict(
        beta_min=0.0, beta_max=0.02, explore_fraction=0.3, beta=0.01, format_weight=1.0
    ),
}
PRESETS["figures"] = PRESETS["geometry"]
PRESETS["arithmetic"] = PRESETS["counting"]
"""The paper's β_min, β_max, w/t, the constant β of its GRPO baseline, and α, by task."""

BUILT_IN_TEXT = ("tiny-text",)
"""Those that read text alone."""

TINY = dict(
    max_new_tokens=24,
    learning_rate=2e-4,
    lr_schedule="constant",
    warmup_fraction=0.04,
    steps=400,
    tokens_per_microbatch=16_384,
    recompute="none",
    save_every=25,
    eval_samples=400,
)
"""Defaults of the built-in models, with which the tiny one learns in two minutes on a CPU."""

SFT = dict(learning_rate=2e-5, lr_schedule="cosine", warmup_fraction=0.1)
"""Defaults of supervised fine-tuning, which are R1-V's settings."""


def profile_defaults(config: TrainConfig) -> dict[str, Any]:
    """Return the defaults that depend on other settings: on the task, the algorithm and the model.

    `config` holds what the user has set, and the defaults of the classes above for the rest.
    """
    of_model = model_defaults(config.model, config.task, config.difficulty)
    preset = of_model.get("task", config.task) if config.preset == "auto" else config.preset
    defaults = dict(PRESETS.get(preset, {}))
    if ALGORITHMS[config.algo]["beta"] == 0:  # the paper's β is that of GRPO
        defaults.pop("beta", None)
    if config.algo == "sft":
        defaults |= SFT
    if config.model in BUILT_IN:
        defaults |= TINY
    return defaults | of_model


def model_defaults(model: str, task: str, difficulty: int) -> dict[str, Any]:
    """Return the defaults of a built-in model that training and evaluation share.

    A model of text alone, which cannot see the items of the default task, is asked for sums.
    """
    if model not in BUILT_IN:
        return {}
    if model in BUILT_IN_TEXT and task == TaskConfig.task:
        task = "arithmetic"
    return {"task": task, "max_new_tokens": answer_tokens(task, difficulty)}


def answer_tokens(task: str, difficulty: int) -> int:
    """Return the most tokens of a built-in model's answer; a worked sum goes through its digits."""
    return 12 + 12 * difficulty if task == "arithmetic" else TINY["max_new_tokens"]
