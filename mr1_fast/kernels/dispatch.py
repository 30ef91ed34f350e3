"""The choice between Triton and other kernels, and the dtype of statistics."""

import os
from importlib.util import find_spec

import torch

_HAS_TRITON = find_spec("triton") is not None  # Triton exists for Linux alone.


def statistics_dtype(logits: torch.Tensor) -> torch.dtype:
    """Return the dtype of log-probabilities, KL and loss: fp32, or fp64 for fp64 logits."""
    return torch.promote_types(logits.dtype, torch.float32)


def use_triton(logits: torch.Tensor) -> bool:
    """Tell whether the Triton kernels take these logits.

    They do on a GPU, and on a CPU under Triton's interpreter (TRITON_INTERPRET=1), in fp32, bf16 or
    fp16.
    """
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return (
        (logits.is_cuda or interpreted)
        and _HAS_TRITON
        and logits.dtype in (torch.float32, torch.bfloat16, torch.float16)
    )
