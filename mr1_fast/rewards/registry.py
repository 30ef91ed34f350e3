"""Finding rewards: the registry of names, dotted paths of modules, and files of Python."""

import importlib.util
import os
import sys
from collections.abc import Callable, Iterable
from importlib.machinery import SourceFileLoader
from pathlib import Path
from types import ModuleType

from ..errors import UserError
from .functions import RewardFunction, is_batched

REWARDS: dict[str, RewardFunction] = {}
"""Every registered reward by name."""


def reward(name: str) -> Callable[[RewardFunction], RewardFunction]:
    """Register the decorated function as the reward `name`.

    It is `f(completion, example) -> float`, or has TRL's form (functions.py). Raises ValueError if
    the name is taken.
    """

    def register(function: RewardFunction) -> RewardFunction:
        if name in REWARDS:
            raise ValueError(f"There is already a reward named {name!r}; choose another name.")
        REWARDS[name] = function
        return function

    return register


def find_reward(name: str) -> RewardFunction:
    """Return the reward of that name; raises UserError if there is none.

    The name is a registered one, `package.module:function` or `file.py:function`.
    """
    if name in REWARDS:
        return REWARDS[name]
    place, colon, attribute = name.rpartition(":")
    if not colon:
        known = ", ".join(sorted(REWARDS))
        raise UserError(
            f"There is no reward named {name!r}; the known ones are {known}, and others are named "
            "as package.module:function or file.py:function."
        )
    if not place or not attribute:
        raise UserError(
            f"The reward {name!r} is incomplete: write package.module:function or file.py:function."
        )
    is_file = place.endswith(".py") or "/" in place or os.sep in place
    module = _run_file(place) if is_file else _import_module(name, place)
    if not callable(getattr(module, attribute, None)):
        own = [
            key
            for key, value in vars(module).items()
            if callable(value) and getattr(value, "__module__", "") == module.__name__
        ]
        raise UserError(
            f"The reward {name!r} is not there: {place} has no function {attribute!r}, but "
            f"{', '.join(own) or 'none at all'}."
        )
    return getattr(module, attribute)


def require_rewards(names: Iterable[str]) -> None:
    """Raise UserError unless every one of the names leads to a function that can be a reward."""
    for name in names:
        is_batched(name, find_reward(name))


def load_plugin(path: str | Path) -> None:
    """Run a Python file so that the functions it decorates with `@reward` are registered.

    Loading the same file again does nothing. Raises UserError if the file is missing or fails; then
    none of its rewards stay registered.
    """
    _run_file(path)


def _run_file(path: str | Path) -> ModuleType:
    """Return the module of a Python file, which is run once in a process."""
    path = Path(os.path.expanduser(path)).resolve()
    if not path.is_file():
        raise UserError(f"The reward file {path} does not exist.")
    name = f"mr1_fast_plugin:{path}"
    if name in sys.modules:
        return sys.modules[name]

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
    return module


def _import_module(name: str, module: str) -> ModuleType:
    """Import the module of the reward `name`, which may lie in the current folder."""
    if os.getcwd() not in sys.path:  # as `python -m` has it, but not the command `mr1`
        sys.path.append(os.getcwd())
    before = dict(REWARDS)
    try:
        return importlib.import_module(module)
    except ModuleNotFoundError as error:
        if error.name is None or not f"{module}.".startswith(f"{error.name}."):
            reason = f"{module} fails with {type(error).__name__}: {error}"  # it imports another
        else:
            reason = f"there is no module {error.name}; a file is named as file.py:function"
    except (Exception, SystemExit) as error:
        reason = f"{module} fails with {type(error).__name__}: {error}"
    REWARDS.clear()
    REWARDS.update(before)
    raise UserError(f"The reward {name!r} cannot be imported: {reason}.")
