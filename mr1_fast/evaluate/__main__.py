"""Accuracy of a model on held-out items: `python -m mr1_fast.evaluate`."""

from ..errors import exit_on_user_error
from .command import main

exit_on_user_error(main)
