"""Accuracy of a model on items of a task: `python -m mr1_fast.evaluate`."""

import sys

from ..errors import exit_on_user_error
from .settings import parse


def main() -> None:
    """Read the settings, and only then import what evaluates."""
    config = parse(sys.argv[1:])

    from .command import run

    run(config)


if __name__ == "__main__":
    exit_on_user_error(main)
