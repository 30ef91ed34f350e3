"""torchvision for a process of its own, from a folder beside the environment.

PyPI's build is for CUDA: beside a torch for CPUs its C library does not load, and then its import
fails for want of two operators. With their names declared, what transformers' processors use of it,
which is all written in Python, works.
"""

import importlib.util
import os
from pathlib import Path

import pytest

FOLDER = Path(os.environ.get("MR1_FAST_TORCHVISION") or Path(__file__).parents[2] / ".torchvision")
IS_INSTALLED = importlib.util.find_spec("torchvision") is not None

needs_torchvision = pytest.mark.skipif(
    not IS_INSTALLED and not (FOLDER / "torchvision").is_dir(),
    reason=f"no torchvision in {FOLDER}: CONTRIBUTING.md says how to get it",
)

PREAMBLE = f"""
import sys
sys.path.append({str(FOLDER)!r})
import torch
try:
    torch.ops.load_library({str(FOLDER / "torchvision" / "_C.so")!r})
except OSError:
    library = torch.library.Library("torchvision", "DEF")
    for name in ("nms", "qnms"):
        library.define(name + "(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")
"""
"""What a script begins with to import torchvision afterwards."""
if IS_INSTALLED:
    PREAMBLE = ""
