"""A process that runs cells beside the first one of the command, which starts it.

Its arguments are the id of that process, the moment at which the call began, and the words of the
command line.
"""

import os
import signal
import sys
import threading
import time

from ..command_line import begin, parse_settings
from ..errors import exit_on_user_error
from .settings import ExperimentConfig

LOOK_SECONDS = 1.0
"""How long it may take until this process notices that the first one has died."""


def end_with(parent: int) -> None:
    """Let this process be stopped, as by `kill`, once its parent has ended."""

    def watch() -> None:
        while os.getppid() == parent:
            time.sleep(LOOK_SECONDS)
        os.kill(os.getpid(), signal.SIGTERM)

    threading.Thread(target=watch, daemon=True).start()


def main(argv: list[str]) -> None:
    """Run cells until all have ended."""
    parent, began, *words = argv
    end_with(int(parent))
    config = parse_settings(ExperimentConfig, words, "python -m mr1_fast.experiment")

    # This imports torch, whose threads the environment limits to one.
    from .command import make_experiment, run_quietly

    run_quietly(make_experiment(config), int(began))


if __name__ == "__main__":
    begin()
    exit_on_user_error(lambda: main(sys.argv[1:]))
