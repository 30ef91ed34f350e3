"""The command `python -m mr1_fast.report RUN`, which writes the page about a run."""

import argparse
import os
from pathlib import Path

from ..errors import begin_command, exit_on_user_error
from ..torchrun import leave_to_first


def main() -> None:
    """Write RUN/report.html for the run folder that the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m mr1_fast.report",
        description="Write RUN/report.html, a page about a training run, and RUN/completions.html, "
        "in which its completions can be searched, from what the run has recorded so far. A run "
        "renews its report every minute and writes both pages at its end; this command writes both "
        "at once, also while a run goes on, and those of an older one again.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a training run")
    parser.add_argument(
        "--live",
        action="store_true",
        help="write the page as a run does while it goes on: at the lowest priority, with the time "
        "left, and so that a browser loads it again every minute",
    )
    arguments = parser.parse_args()
    if arguments.live:
        os.nice(19)

    # Matplotlib takes a second to import, which `--help` need not wait for.
    from .run_report import write_report

    print(f"wrote {write_report(arguments.run, live=arguments.live)}")


if __name__ == "__main__":
    leave_to_first()
    begin_command()
    exit_on_user_error(main)
