"""Runs of mr1_fast.train in the process of the tests."""

from mr1_fast import train
from mr1_fast.command_line import parse_train_config


def run(argv: list[str]) -> None:
    """Do what `python -m mr1_fast.train` does; raises UserError where that exits."""
    train.run(parse_train_config(argv))
