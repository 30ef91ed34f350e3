"""Run the tests of TRL or Liger-Kernel with our classes and functions in place of theirs.

    python tests/integrations/run_upstream.py liger SOURCES/test/chunked_loss/test_grpo_loss.py
    python tests/integrations/run_upstream.py trl SOURCES/tests/test_utils.py -k log_softmax

SOURCES is an unpacked copy of the library's sources, of the version that is installed; nothing is
fetched. What follows the path goes to pytest. With `--own` the library's own code runs, to see what
fails without us. docs/integrations.md lists what differs, and why.
"""

import os
import sys
from importlib import import_module
from pathlib import Path

import pytest

REPLACED = {
    "liger": ("LigerFusedLinearGRPOLoss", "triton_grpo_loss", "fused_selective_log_softmax"),
    "trl": (
        "selective_log_softmax", "entropy_from_logits", "selective_log_softmax_and_entropy",
        "ChunkedLogProbFunction", "GRPOTrainer",
    ),
}  # fmt: skip


class Replacing:
    """A pytest plugin that puts our names into the modules of the tests."""

    def __init__(self, library: str):
        ours = import_module(f"mr1_fast.integrations.{library}")
        names = {name: name for name in REPLACED[library]} | {"GRPOTrainer": "FusedGRPOTrainer"}
        self.ours = {name: getattr(ours, own, None) for name, own in names.items()}
        self.seen: set[str] = set()

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        """Replace what the item's module has imported."""
        for name, own in self.ours.items():
            if own is not None and hasattr(item.module, name):
                setattr(item.module, name, own)
                self.seen.add(name)

    def pytest_terminal_summary(self, terminalreporter) -> None:
        """Name what has been replaced."""
        terminalreporter.write_line(f"ours: {', '.join(sorted(self.seen)) or 'nothing'}")


def main(library: str, path: str, *options: str) -> int:
    """Run the tests in the folder of the sources, whose packages they import."""
    plugins = [] if "--own" in options else [Replacing(library)]
    options = [option for option in options if option != "--own"]
    path = Path(path).resolve()
    root = next(folder for folder in path.parents if (folder / "pyproject.toml").exists())
    os.chdir(root)
    sys.path.insert(0, str(root))
    arguments = ["-q", "-p", "no:cacheprovider", "-n", "0", "--tb=line", str(path), *options]
    return pytest.main(arguments, plugins)


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in REPLACED:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
