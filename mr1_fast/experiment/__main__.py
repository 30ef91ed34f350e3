"""The paper's comparison in one command: `python -m mr1_fast.experiment`."""

from ..errors import exit_on_user_error
from .command import main

if __name__ == "__main__":
    exit_on_user_error(main)
