"""Whether a run will fit on a card, in bytes by phase and component: `python -m mr1_fast.plan`."""

from ..errors import exit_on_user_error
from .command import main

if __name__ == "__main__":
    exit_on_user_error(main)
