"""Post-train vision-language models with GRPO-D on one 24 GB GPU.

Importing the package loads no torch: each name below is imported when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from .version import __version__

if TYPE_CHECKING:
    from .config import Sampling
    from .kl_schedule import DynamicKL
    from .loss import (
        GRPOLoss,
        grpo_loss,
        linear_grpo_loss,
        linear_token_logprobs,
        token_logprobs,
        token_weights,
    )
    from .rewards import reward
    from .rollout.engine import Engine

__all__ = [
    "DynamicKL",
    "Engine",
    "GRPOLoss",
    "Sampling",
    "__version__",
    "grpo_loss",
    "linear_grpo_loss",
    "linear_token_logprobs",
    "reward",
    "token_logprobs",
    "token_weights",
]

_MODULES = {
    "DynamicKL": "kl_schedule",
    "Engine": "rollout.engine",
    "GRPOLoss": "loss",
    "Sampling": "config",
    "grpo_loss": "loss",
    "linear_grpo_loss": "loss",
    "linear_token_logprobs": "loss",
    "reward": "rewards",
    "token_logprobs": "loss",
    "token_weights": "loss",
}
"""The module in which each name is defined."""


def __getattr__(name: str) -> object:
    """Import a public name on its first use."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    return getattr(import_module(f".{_MODULES[name]}", __name__), name)


def __dir__() -> list[str]:
    """The public names, which are not imported yet, with the others."""
    return sorted({*globals(), *__all__})
