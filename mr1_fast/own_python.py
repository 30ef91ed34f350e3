"""The Python of the user's own that a run needs, and whether a resumed run may run it.

A plugin and the rewards that are named by file or module run as they are. Whoever names one on the
command line, in a file for --config or in Python trusts it. A run's folder may come from somebody
else, and with it the config.yaml that --resume reads: what is named there alone is run only if this
user has run it before. Which those are is kept in the cache.
"""

import json
import os
import shlex
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path

from .config import RewardConfig, cache_folder
from .errors import UserError, shortened
from .files import write_json

KNOWN = "own_python.json"
"""The file in the cache that lists what this user has run."""
MOST_KNOWN = 1000
"""How many names it keeps, the newest."""


def python_of(config: RewardConfig) -> dict[str, str]:
    """Return what Python a run needs: absolute files and names in modules, each with the setting
    that names it."""
    found = {}
    if config.plugin:
        found[_absolute(config.plugin)] = "plugin"
    for name in config.extra_rewards:
        place, colon, _ = name.rpartition(":")
        if colon:
            is_file = place.endswith(".py") or "/" in place
            found[_absolute(place) if is_file else name] = "extra_rewards"
    return found


def remember_python(config: RewardConfig) -> None:
    """Note that this user has run the Python that a run needs, if the cache can be written."""
    needed, known = python_of(config), _known()
    if new := [each for each in needed if each not in known]:
        with suppress(UserError, OSError, RuntimeError):
            write_json(cache_folder() / KNOWN, [*known, *new][-MOST_KNOWN:])


def require_known_python(config: RewardConfig, named: Collection[str], run: str) -> None:
    """Raise UserError where a run that is resumed needs Python which its own folder alone names.

    named: the settings that the user has given besides the folder `run`. What this user has run
    before is known, whatever folder names it.
    """
    known = _known()
    for place, setting in python_of(config).items():
        if setting in named or place in known:
            continue
        value = config.plugin if setting == "plugin" else json.dumps(config.extra_rewards)
        flag = f"--{setting.replace('_', '-')} {shlex.quote(value)}"
        raise UserError(
            f"config.yaml of {shortened(run, 200)} has the {setting} {shortened(place, 200)}, "
            "which is Python that you have not run before, and a run's folder may be somebody "
            f"else's: read it, and if you trust it, add {shortened(flag, 300)}."
        )


def _known() -> list[str]:
    """Return the names in the cache; none if it cannot be read."""
    try:
        found = json.loads((cache_folder() / KNOWN).read_text("utf-8"))
    except (OSError, RuntimeError, ValueError, RecursionError):
        return []
    return [each for each in found if isinstance(each, str)] if isinstance(found, list) else []


def _absolute(path: str) -> str:
    return str(Path(os.path.expanduser(path)).resolve())
