"""Post-train vision-language models with GRPO-D on one 24 GB GPU."""

import os

# torch's OpenMP threads spin while they wait, for milliseconds, which beside any other busy process makes a CPU run
# eight times slower. A short spin costs a tenth when alone. libgomp reads this once, when torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

from typing import TYPE_CHECKING

from .kl_schedule import DynamicKL
from .version import __version__

if TYPE_CHECKING:
    from .loss import (
        GRPOLoss,
        grpo_loss,
        linear_grpo_loss,
        linear_token_logprobs,
        token_logprobs,
        token_weights,
    )

__all__ = [
    "DynamicKL",
    "GRPOLoss",
    "__version__",
    "grpo_loss",
    "linear_grpo_loss",
    "linear_token_logprobs",
    "token_logprobs",
    "token_weights",
]


def __getattr__(name: str):
    """The loss functions, on first use: the process that checks answers imports this package, and needs no torch."""
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from . import loss

    return getattr(loss, name)
