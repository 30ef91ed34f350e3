"""What a run is: the settings that no resume changes, and those that may be others each time."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .errors import UserError, shortened
from .setting_values import shown

FIXED = (
    # what is asked
    *("task", "data_split", "data_config", "columns", "bad_rows", "train_samples"),
    *("difficulty", "seed"),
    *("system_prompt", "prompt_template", "prompt_suffix", "max_prompt_tokens", "max_pixels"),
    "shrink_images",
    # who answers, and how
    *("lora", "lora_rank", "load_in_4bit", "dtype", "freeze_vision"),
    *("max_new_tokens", "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "stop"),
    # what is rewarded
    *("judge", "format_weight", "extra_rewards", "overlong_penalty"),
    # how that is learned
    *("algo", "preset", "sft_target", "num_generations", "prompts_per_step", "updates_per_batch"),
    *("importance_cap", "loss_type", "surrogate", "ratio", "clip_low", "clip_high", "clip_delta"),
    *("advantage", "mask_truncated", "skip_equal_groups", "entropy_coefficient"),
    *("beta_shape", "beta", "beta_min", "beta_max", "explore_fraction", "target_kl"),
    *("optimizer", "learning_rate", "lr_schedule", "warmup_fraction", "weight_decay"),
    "max_grad_norm",
)
"""Settings by which a run is the run it is: with others, its steps would be parts of two runs."""

CHANGEABLE = (
    # how long it goes on
    *("steps", "max_hours", "patience"),
    # what is saved, evaluated and shown
    *("output", "resume", "save_every", "save", "push_to_hub", "loggers", "open"),
    *("eval_samples", "eval_every", "eval_data", "eval_split", "keep_best"),
    # where files lie: of model and data, the content is compared
    *("model", "data", "image_root", "allow_urls", "plugin"),
    # where and in how much memory it is computed, and how long a reward may take
    *("device", "sharding", "tokens_per_microbatch", "recompute", "offload_checkpoints"),
    *("reference", "fused_layers", "reward_seconds"),
)
"""Settings that may be others whenever a run goes on."""
TRAINING_DATA = "the training data"
"""Beside its settings, what a run keeps: what identifies the rows that it learns from."""


def identity(config: Any) -> dict[str, Any]:
    """Return the settings that a run keeps for its whole life, by name.

    Files with rewards may lie elsewhere when it goes on.
    """
    settings = {name: getattr(config, name) for name in FIXED}
    rewards = {name.rpartition("/")[2]: value for name, value in config.extra_rewards.items()}
    return {**settings, "extra_rewards": rewards}


def require_identity(
    found: Mapping[str, Any], begun: Mapping[str, Any], run: Path, keep: str = "keep that"
) -> None:
    """Raise UserError where a run would go on with other settings than it was begun with.

    found, begun: what `identity` returns; a setting that one of them lacks, as those of earlier
        versions do, is not compared.
    keep: the way by which the run goes on.
    """
    for name in (*FIXED, TRAINING_DATA):
        if name in found and name in begun and found[name] != begun[name]:
            was = shortened(shown(begun[name]))
            raise UserError(
                f"{name} is {shortened(shown(found[name]))}, but the run in {run} was begun with "
                f"{was}, which no resume can change: {keep}, or begin another run with a new "
                "--output."
            )
