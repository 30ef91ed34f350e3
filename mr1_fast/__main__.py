"""`mr1 NAME …` is `python -m mr1_fast.NAME …`, for the commands below."""

import runpy
import sys

from . import streams
from .version import __version__

COMMANDS = {
    "train": "post-train a model with GRPO-D, GRPO or supervised fine-tuning",
    "evaluate": "measure the accuracy of a model on held-out items",
    "plan": "tell whether a run fits into the memory of a GPU, and what to change if not",
    "experiment": "run the paper's comparison of methods, or one of its ablations",
    "merge": "merge a LoRA adapter into its 16-bit model, layer by layer",
    "report": "write the report of a run again",
    "push": "upload the model of a run to the Hugging Face Hub",
    "env": "print the versions, devices and kernels that are used, for bug reports",
}


def usage() -> str:
    """How to call the commands, with a line for each."""
    lines = [f"  {name:<12}{about}" for name, about in COMMANDS.items()]
    return "\n".join(
        [
            "usage: mr1 COMMAND [ARGUMENTS]",
            "       mr1 COMMAND --help",
            "       mr1 --version",
            "",
            *lines,
        ]
    )


def main() -> None:
    """Run the command that the first argument names, with the other arguments."""
    streams.prepare()
    name = sys.argv[1] if len(sys.argv) > 1 else None
    if name in ("-h", "--help"):
        print(usage())
    elif name == "--version":
        print(__version__)
    elif name in COMMANDS:
        del sys.argv[1]
        runpy.run_module(f"{__package__}.{name}", run_name="__main__", alter_sys=True)
    else:
        reason = "no command is given" if name is None else f"{name!r} is no command"
        print(f"error: {reason}.\n{usage()}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
