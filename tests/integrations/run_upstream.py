"""Run the tests of TRL or Liger-Kernel with our classes and functions in place of theirs.

    python tests/integrations/run_upstream.py liger SOURCES/test/chunked_loss/test_grpo_loss.py
    python tests/integrations/run_upstream.py trl SOURCES/tests/test_grpo_trainer.py -k loss_types

SOURCES is an unpacked copy of the library's sources, of the version that is installed or near to
it; nothing is fetched. Of TRL's repository `tests`, `scripts` and `pyproject.toml` are needed:
`upstream_hub.py` makes what they load from the hub. What follows the path goes to pytest. With
`--own` the library's own code runs, to see what fails without us. docs/integrations.md lists what
differs, and why.
"""

import os
import sys
import tempfile
from importlib import import_module
from pathlib import Path

import pytest
import torch

REPLACED = {
    "liger": ("LigerFusedLinearGRPOLoss", "triton_grpo_loss", "fused_selective_log_softmax"),
    "trl": (
        "selective_log_softmax", "entropy_from_logits", "selective_log_softmax_and_entropy",
        "ChunkedLogProbFunction", "GRPOTrainer",
    ),
}  # fmt: skip


class Replacing:
    """A pytest plugin that puts names into the modules of the tests."""

    def __init__(self, names: dict[str, object]):
        self.names, self.seen = names, set()

    def pytest_itemcollected(self, item: pytest.Item) -> None:
        """Replace what the item's module has imported."""
        for name, value in self.names.items():
            if hasattr(item.module, name):
                setattr(item.module, name, value)
                self.seen.add(name)

    def pytest_terminal_summary(self, terminalreporter) -> None:
        """Name what has been replaced."""
        terminalreporter.write_line(f"replaced: {', '.join(sorted(self.seen)) or 'nothing'}")


class EarlierArguments:
    """TRL's function on hidden states, or ours, with the arguments that TRL's had until 1.10."""

    def __init__(self, function: type):
        self.function = function

    def apply(self, hidden, weight, targets, temperature, chunk_size) -> tuple:
        """Return log-probs and entropy."""
        outputs = None, 1.0, ("log_probs", "entropy")
        rest = targets, temperature, chunk_size, *outputs
        return self.function.apply(hidden, weight, None, *rest)[:2]


def replacements(library: str, own: bool) -> dict[str, object]:
    """What the tests get in the place of what they import."""
    ours = import_module(f"mr1_fast.integrations.{library}")
    different = {"GRPOTrainer": "FusedGRPOTrainer"}
    names = {name: getattr(ours, different.get(name, name)) for name in REPLACED[library]}
    names = {} if own else names
    if library == "trl":
        function = import_module("trl.kernels" if own else ours.__name__).ChunkedLogProbFunction
        names["_ChunkedLogProbFunction"] = EarlierArguments(function)
    return names


def prepare_trl(root: Path) -> None:
    """Make what TRL's tests load in the current folder, and names that newer versions lack."""
    from trl import import_utils
    from trl.trainer import utils
    from upstream_hub import make_hub

    make_hub(root / "scripts")
    import_utils.is_joblib_available = _no
    if not torch.cuda.is_available():  # Liger's kernels fail, and stay in the models' classes
        import_utils.is_liger_kernel_available = _no
    utils.patch_chunked_lm_head = utils.add_fused_lm_head


def _no(*_, **__) -> bool:
    return False


def main(library: str, path: str, *options: str) -> int:
    """Run the tests in the folder of the sources, whose packages they import."""
    plugins = [Replacing(replacements(library, "--own" in options))]
    options = [option for option in options if option != "--own"]
    path = Path(path).resolve()
    root = next(folder for folder in path.parents if (folder / "pyproject.toml").exists())
    arguments = ["-q", "-p", "no:cacheprovider", "-n", "0", "--tb=line", str(path), *options]
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder if library == "trl" else root)
        if library == "trl":
            prepare_trl(root)
        sys.path.insert(0, str(root))
        return pytest.main(arguments, plugins)


if __name__ == "__main__":
    if len(sys.argv) < 3 or sys.argv[1] not in REPLACED:
        sys.exit(__doc__)
    sys.exit(main(*sys.argv[1:]))
