"""The HTML page about a run: `python -m mr1_fast.report`."""

from ..errors import exit_on_user_error
from .run_report import main

if __name__ == "__main__":
    exit_on_user_error(main)
