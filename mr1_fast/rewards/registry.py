"""The registry of rewards: registering a function by name, and loading a user's file of rewards."""

import importlib.util
import sys
from collections.abc import Callable, Iterable
from importlib.machinery import SourceFileLoader
from pathlib import Path

from ..errors import UserError
from ..types import Example

RewardFunction = Callable[[str, Example], float]
"""A function of a completion's text and its example."""

REWARDS: dict[str, RewardFunction] = {}
"""Every registered reward by name."""


def reward(name: str) -> Callable[[RewardFunction], RewardFunction]:
    """Register the decorated function `f(completion, example) -> float` as the reward `name`.

    Raises ValueError if the name is taken.
    """

    def register(function: RewardFunction) -> RewardFunction:
        if name in REWARDS:
            raise ValueError(f"There is already a reward named {name!r}; choose another name.")
        REWARDS[name] = function
        return function

    return register


def find_reward(name: str) -> RewardFunction:
    """Return the reward of that name; raises UserError, which lists the known ones, for another."""
    if name not in REWARDS:
        known = ", ".join(sorted(REWARDS))
        raise UserError(f"There is no reward named {name!r}; the known ones are {known}.")
    return REWARDS[name]


def require_rewards(names: Iterable[str]) -> None:
    """Raise UserError unless a reward is registered under every one of the names."""
    for name in names:
        find_reward(name)


def load_plugin(path: str | Path) -> None:
    """Run a Python file so that the functions it decorates with `@reward` are registered.

    Loading the same file again does nothing. Raises UserError if the file is missing or fails; then
    none of its rewards stay registered.
    """
    path = Path(path).expanduser().resolve()
    if not path.is_file():
        raise UserError(f"The reward file {path} does not exist.")
    name = f"mr1_fast_plugin:{path}"
    if name in sys.modules:
        return

    before = dict(REWARDS)
    loader = SourceFileLoader(name, str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    sys.modules[name] = module  # dataclasses look up the module that defines them
    try:
        loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        REWARDS.clear()
        REWARDS.update(before)
        raise UserError(
            f"The reward file {path} fails with {type(error).__name__}: {error}"
        ) from error
