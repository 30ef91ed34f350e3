"""Accuracy of a model on items of a task: `python -m mr1_fast.evaluate`."""

from ..command_line import start
from ..errors import exit_on_user_error
from .settings import parse

if __name__ == "__main__":
    config = start(parse)

    from .command import evaluate_model

    exit_on_user_error(lambda: evaluate_model(config))
