"""`python -m mr1_fast.env`, the report for bug reports."""

import os
import platform
import subprocess
import sys

import pytest
import torch

from mr1_fast import env
from mr1_fast.kernels import native
from mr1_fast.kernels.grpo import rows_cuda
from mr1_fast.version import __version__


def report(**environment: str) -> dict[str, str]:
    """Name and value of each printed line."""
    inherited = {
        name: value for name, value in os.environ.items() if not name.startswith("MR1_FAST_")
    }
    run = subprocess.run(
        [sys.executable, "-m", "mr1_fast.env"],
        env=inherited | environment,
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr
    return {line[:20].strip(): line[20:].strip() for line in run.stdout.splitlines()}


def test_prints_versions_and_what_is_active():
    lines = report()
    assert lines["mr1_fast"] == __version__
    assert lines["python"].startswith(platform.python_version())
    assert lines["torch"].startswith(torch.__version__) and lines["torch"].endswith("threads")
    assert (lines["GPU"] == "none") == (not torch.cuda.is_available())
    assert lines["MFU"].startswith("MFU is ")
    assert torch.cuda.is_available() or lines["MFU"].startswith("MFU is not reported: ")
    assert lines["Triton kernels"].startswith("triton ")
    assert lines["native CPU kernels"] == native.status()[1]
    assert lines["native CUDA kernels"] == rows_cuda.status()[1]
    assert lines["packed attention"] in ("sdpa", "torch_varlen", "flash_attn")
    assert lines["decode attention"] in ("Triton", "native", "PyTorch")
    if torch.cuda.is_available():
        assert lines["decode linears"].startswith("one kernel for 16 bits, 4 bits and LoRA; ")
    else:
        assert lines["decode linears"].startswith("one product for layers on the same input; ")
    for package in ("transformers", "safetensors", "datasets", "flash-attn"):
        assert lines[package] == "not installed" or lines[package][0].isdigit()


def test_says_what_is_turned_off():
    assert report(MR1_FAST_NATIVE="0")["native CPU kernels"] == "off, as MR1_FAST_NATIVE=0 says"


def test_a_package_that_is_missing_is_said_to_be(monkeypatch):
    monkeypatch.setattr(env, "PACKAGES", ("no-such-package",))
    assert env.lines()[-1] == ("no-such-package", "not installed")


@pytest.mark.filterwarnings("ignore:mr1_fast's native CPU kernels")
def test_libraries_that_were_not_built_are_said_to_be(monkeypatch, tmp_path):
    for module in (native, rows_cuda):
        monkeypatch.setattr(module, "LIBRARY", tmp_path / "missing.so")
        module.status.cache_clear()
    try:
        lines = dict(env.lines())
        assert lines["native CPU kernels"].startswith("not built: no missing.so, as a C++ compiler")
        assert lines["native CUDA kernels"].startswith("not built: no missing.so, as nvcc")
    finally:
        monkeypatch.undo()
        native.status.cache_clear()
        rows_cuda.status.cache_clear()
