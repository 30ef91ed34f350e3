"""The command `python -m mr1_fast.experiment`, which runs a comparison and writes its report."""

import sys

from ..command_line import begin, parse_settings
from ..errors import exit_on_user_error
from .settings import ExperimentConfig


def main(argv: list[str]) -> None:
    """Run the experiment that the words of a command line describe; UserError for a bad word."""
    config = parse_settings(ExperimentConfig, argv, "python -m mr1_fast.experiment")

    # This imports torch, which `--help` and a wrong flag need not wait for.
    from .command import run_experiment

    run_experiment(config, argv)


if __name__ == "__main__":
    begin()
    exit_on_user_error(lambda: main(sys.argv[1:]))
