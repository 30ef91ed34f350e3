"""Runs tests/triton under Triton's interpreter, in two processes of their own.

The interpreter must be chosen before Triton is imported. With a GPU these tests run compiled, in
the ordinary run.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent / "triton"
FILES = sorted(FOLDER.glob("test_*.py"))


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are tested on the GPU")
@pytest.mark.parametrize("half", [0, 1])
@pytest.mark.slow
def test_kernels_under_the_interpreter(half):
    pytest.importorskip("triton")
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *FILES[half::2]],
        cwd=FOLDER.parents[1],
        env=os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-4000:]
    assert " passed" in run.stdout
