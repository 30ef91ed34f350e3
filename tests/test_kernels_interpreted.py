"""Runs tests/kernels under Triton's interpreter, in processes of its own: it must be chosen before Triton is imported.

With a GPU these tests run compiled, in the ordinary run.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parent / "kernels"


@pytest.mark.skipif(torch.cuda.is_available(), reason="the kernels are tested on the GPU")
@pytest.mark.parametrize("file", sorted(path.name for path in FOLDER.glob("test_*.py")))
@pytest.mark.slow
def test_kernels_under_the_interpreter(file):
    pytest.importorskip("triton")
    command = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", str(FOLDER / file)]
    environment = os.environ | {"TRITON_INTERPRET": "1"}
    run = subprocess.run(command, cwd=FOLDER.parents[1], env=environment, capture_output=True, text=True)
    assert run.returncode == 0, run.stdout[-8000:] + run.stderr[-4000:]
    assert " passed" in run.stdout
