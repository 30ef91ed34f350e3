"""Whether a run will fit on a card, in bytes by phase and component: `python -m mr1_fast.plan`."""

from ..command_line import start
from ..errors import exit_on_user_error
from ..torchrun import leave_to_first
from .settings import parse

if __name__ == "__main__":
    leave_to_first()
    config = start(parse)

    from .command import print_plan

    exit_on_user_error(lambda: print_plan(config))
