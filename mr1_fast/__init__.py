"""Post-train vision-language models with GRPO-D on one 24 GB GPU."""

import os

# torch's OpenMP threads spin while they wait, for milliseconds, which beside any other busy process makes a CPU run
# eight times slower. A short spin costs a tenth when alone. libgomp reads this once, when torch is imported.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "3000")

from .kl_schedule import DynamicKL
from .loss import GRPOLoss, grpo_loss, linear_grpo_loss, linear_token_logprobs, token_logprobs, token_weights
from .version import __version__

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
