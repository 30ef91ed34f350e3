"""Runs tests/triton under Triton's interpreter, each file in a process of its own.

The interpreter must be chosen before Triton is imported. With a GPU these tests run compiled, in
the ordinary run.
"""

import os
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent / "triton"
FILES = sorted(path.name for path in FOLDER.glob("test_*.py"))


@pytest.fixture(scope="module")
def runs():
    """The finished run of each file, by name; two at a time."""
    pytest.importorskip("triton")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}

    def run(file: str) -> subprocess.CompletedProcess:
        command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(FOLDER / file)]
        return subprocess.run(
            command, cwd=FOLDER.parents[1], env=environment, capture_output=True, text=True
        )

    with ThreadPoolExecutor(2) as pool:
        return dict(zip(FILES, pool.map(run, FILES), strict=True))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are tested on the GPU")
@pytest.mark.parametrize("file", FILES)
@pytest.mark.slow
def test_kernels_under_the_interpreter(file, runs):
    assert runs[file].returncode == 0, runs[file].stdout[-8000:] + runs[file].stderr[-4000:]
    assert " passed" in runs[file].stdout
