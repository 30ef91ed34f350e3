"""The fused loss inside other trainers, one module a library; mr1_fast itself needs none of them.

- trl: TRL's GRPOTrainer with this package's loss, β(s) for it, and TRL's functions on logits
- liger: Liger-Kernel's GRPO losses, by a change of import
- verl: verl's fused LM head
- head: `model(..., head=f)`, for a training loop of your own
"""

import warnings
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

TESTED = {"trl": ">=1.16,<1.17", "liger-kernel": ">=0.8.5,<0.9"}
"""Package → the versions whose numbers the tests compare with ours."""


@cache
def warn_once(message: str) -> None:
    """Give a UserWarning at the first call with this message; later calls do nothing."""
    warnings.warn(message, UserWarning, stacklevel=3)


def check_version(package: str) -> None:
    """Warn once if `package` is installed in a version that the tests do not cover."""
    try:
        installed = version(package)
    except PackageNotFoundError:
        return
    if installed not in SpecifierSet(TESTED[package], prereleases=True):
        tested = f"{package}{TESTED[package]}"
        warn_once(f"{package} {installed} is installed, mr1_fast was tested with {tested}")
