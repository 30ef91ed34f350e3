"""Post-train vision-language models with GRPO-D on one 24 GB GPU."""

from .kl_schedule import DynamicKL
from .version import __version__

__all__ = ["DynamicKL", "__version__"]
