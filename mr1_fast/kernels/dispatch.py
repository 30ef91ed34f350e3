"""Which kernels take a tensor, and in which dtype statistics are computed."""

import os
from importlib.util import find_spec

import torch

_HAS_TRITON = find_spec("triton") is not None  # it exists for Linux alone


def statistics_dtype(logits: torch.Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64 logits."""
    return torch.promote_types(logits.dtype, torch.float32)


def use_triton(logits: torch.Tensor) -> bool:
    """Whether the Triton kernels take these logits: on a GPU, or anywhere under Triton's interpreter."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return (
        (logits.is_cuda or interpreted)
        and _HAS_TRITON
        and logits.dtype in (torch.float32, torch.bfloat16, torch.float16)
    )
