"""Defaults that depend on other settings: on the task, the algorithm and the model."""

from typing import Any

from .config import TrainConfig
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
"""The paper's β_min, β_max, w/t, the constant β of its GRPO baseline, and α, by task."""

BUILT_IN = ("tiny", "small", "tiny-qwen2_5vl", "tiny-qwen3vl", "tiny-text")
"""Names of the models that are made without downloads (model/tiny.py)."""

TINY = dict(
    max_new_tokens=24,
    learning_rate=2e-4,
    lr_schedule="constant",
    warmup_fraction=0.04,
    steps=120,
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
    preset = config.task if config.preset == "auto" else config.preset
    defaults = dict(PRESETS.get(preset, {}))
    if ALGORITHMS[config.algo]["beta"] == 0:  # the paper's β is that of GRPO
        defaults.pop("beta", None)
    if config.algo == "sft":
        defaults |= SFT
    if config.model in BUILT_IN:
        defaults |= TINY
    return defaults
