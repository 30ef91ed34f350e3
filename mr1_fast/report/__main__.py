"""The HTML page about a run: `python -m mr1_fast.report`."""

from ..errors import exit_on_user_error
from .run_report import main

exit_on_user_error(main)
