"""The fused loss at the seams of other trainers: one module for each, none of which this package needs itself."""

import warnings
from functools import cache
from importlib.metadata import PackageNotFoundError, version

from packaging.specifiers import SpecifierSet

TESTED = {"trl": ">=1.16,<1.17", "liger-kernel": ">=0.8.5,<0.9"}
"""Versions that the tests compare with; CI holds one of each."""


@cache
def warn_once(message: str) -> None:
    """A UserWarning, once in the life of the process."""
    warnings.warn(message, UserWarning, stacklevel=3)


def check_version(package: str) -> None:
    """Warn once where `package` is installed in a version that the tests have not seen."""
    try:
        installed = version(package)
    except PackageNotFoundError:
        return
    if installed not in SpecifierSet(TESTED[package], prereleases=True):
        warn_once(
            f"{package} {installed} is installed, mr1_fast was tested with {package}{TESTED[package]}"
        )
