"""The command `python -m mr1_fast.report RUN`, which writes the page about a run."""

import argparse
from pathlib import Path

from ..errors import exit_on_user_error


def main() -> None:
    """Write RUN/report.html for the run folder that the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m mr1_fast.report",
        description="Write RUN/report.html, a page about a training run, from what the run has "
        "recorded so far. A run writes its page at its end; this command shows a run that is going "
        "on, or writes the page of an older one again.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a training run")
    run = parser.parse_args().run

    # Matplotlib takes a second to import, which `--help` need not wait for.
    from .run_report import write_report

    print(f"wrote {write_report(run)}")


if __name__ == "__main__":
    exit_on_user_error(main)
