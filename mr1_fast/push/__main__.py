"""The command `python -m mr1_fast.push RUN`, which uploads the model of a run to the Hub."""

import argparse
from pathlib import Path

from ..command_line import begin
from ..errors import exit_on_user_error
from ..torchrun import leave_to_first


def main() -> None:
    """Upload RUN/final for the run folder that the command line names."""
    parser = argparse.ArgumentParser(
        prog="python -m mr1_fast.push",
        description="Upload RUN/final, the trained model with its card, to the Hugging Face Hub "
        "in one commit. Training with --push-to-hub does this at its end; this command does it "
        "later, or again after an upload that failed. Log in first with `hf auth login`.",
    )
    parser.add_argument("run", type=Path, metavar="RUN", help="folder of a finished training run")
    parser.add_argument(
        "name",
        nargs="?",
        metavar="NAME",
        help="repository, such as me/my-model, which is created if need be; by default the "
        "--push-to-hub of the run",
    )
    given = parser.parse_args()

    # huggingface_hub takes a second to import, which `--help` need not wait for.
    from .upload import push_run

    print(f"uploaded {given.run / 'final'} to {push_run(given.run, given.name)}")


if __name__ == "__main__":
    leave_to_first()
    begin()
    exit_on_user_error(main)
