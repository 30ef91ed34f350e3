"""Whether a run will fit on a card, in bytes by phase and component: `python -m mr1_fast.plan`.

The settings are read before anything that imports torch, so that a wrong one is answered at once.
"""

import sys

from ..config import parse_config, profile_defaults
from ..errors import exit_on_user_error
from .settings import PlanConfig


def main() -> None:
    """Read the settings from the command line and print the plan."""
    prog = "python -m mr1_fast.plan"
    config = parse_config(PlanConfig, sys.argv[1:], prog, profile_defaults)
    config.check()

    from .command import print_plan

    print_plan(config)


if __name__ == "__main__":
    exit_on_user_error(main)
