"""`python -m mr1_fast.env`, the report for bug reports."""

import os
import platform
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.requirements import Requirement

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
    for package in env.REQUIRED:
        assert lines[package] == version(package)
    for package in env.OPTIONAL:
        assert lines[package.name][0].isdigit() or lines[package.name].startswith("missing, needed")


def test_says_what_is_turned_off():
    assert report(MR1_FAST_NATIVE="0")["native CPU kernels"] == "off, as MR1_FAST_NATIVE=0 says"


def test_a_package_that_is_missing_is_said_to_be_and_for_what():
    missing = env.OptionalPackage("no-such-package", "--dancing", "gpu")
    assert missing.line() == "missing, needed for --dancing: pip install 'mr1_fast[gpu]'"
    alone = env.OptionalPackage("no-such-package", "--dancing")
    assert alone.line() == "missing, needed for --dancing: pip install no-such-package"


def extras() -> dict[str, set[str]]:
    """The packages of each extra in pyproject.toml, those of the extras that it includes, too."""
    text = (Path(__file__).parents[1] / "pyproject.toml").read_text(encoding="utf-8")
    table = tomllib.loads(text)["project"]["optional-dependencies"]

    def packages(extra: str) -> set[str]:
        found = set()
        for requirement in map(Requirement, table[extra]):
            if requirement.name == "mr1_fast":
                found |= set().union(*map(packages, requirement.extras))
            else:
                found.add(requirement.name)
        return found

    return {extra: packages(extra) for extra in table}


def test_every_hint_names_the_extra_that_installs_the_package():
    packages = extras()
    for package in env.OPTIONAL:
        if package.extra:
            assert package.name in packages[package.extra], package
    hinted = {package.name for package in env.OPTIONAL}
    assert packages["lora"] | packages["gpu"] | packages["loggers"] | packages["trl"] <= hinted


@pytest.mark.filterwarnings("ignore:mr1_fast's native CPU kernels")
def test_libraries_that_were_not_built_are_said_to_be(monkeypatch, tmp_path):
    for module in (native, rows_cuda):
        monkeypatch.setattr(module, "LIBRARY", tmp_path / "missing.so")
        module.status.cache_clear()
    try:
        lines = dict(env.lines())
        assert lines["native CPU kernels"].startswith("not built: no missing.so, as a C++ compiler")
        assert lines["native CUDA kernels"].startswith("not built: no missing.so, as nvcc")
        assert lines["native CUDA kernels"].endswith("install mr1_fast again")
    finally:
        monkeypatch.undo()
        native.status.cache_clear()
        rows_cuda.status.cache_clear()
