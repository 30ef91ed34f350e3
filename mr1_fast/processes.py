"""Commands of this package as processes of their own, which import it from where it lies here."""

import os
import sys
from pathlib import Path

_ROOT = str(Path(__file__).parents[1])


def module_process(module: str, *arguments: str) -> tuple[list[str], dict[str, str]]:
    """Return the command that runs a module of this package, and the environment for it.

    The working directory is not searched for modules (`-P`): one that holds a json.py, for example,
    would replace Python's own.
    """
    paths = [_ROOT, os.environ.get("PYTHONPATH", "")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return [sys.executable, "-P", "-m", module, *arguments], environment
