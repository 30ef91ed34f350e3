"""`row_grpo` on a GPU by csrc/fused_grpo_cuda.cu, an alternative to the Triton kernel.

It needs a GPU with thread block clusters (sm_90 and newer), and rows whose bytes are a multiple of
16. It is the default on an architecture only once a benchmark there says so
(benchmarks/bench_grpo_loss.py); MR1_FAST_CUDA=1 turns it on wherever it can run, MR1_FAST_CUDA=0
off. The other row operations stay in Triton.
"""

import ctypes
import os
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from ..native import DTYPES, load
from ..tuned import tuned
from .objective import Objective, RowResults
from .rows_native import grpo_arguments

LIBRARY = Path(__file__).parents[2] / "_cuda.so"

FASTER_THAN_TRITON: frozenset[tuple[int, int]] = frozenset()
"""Compute capabilities on which the benchmark found it faster; none so far."""


class ClusterTile(NamedTuple):
    """A launch setting: how much of a row a thread block holds."""

    part_kib: int
    """KiB of a row per block, at most, if the cluster can be so large; 0: by the GPU's memory."""


CLUSTER_VARIANTS = (ClusterTile(80), ClusterTile(40), ClusterTile(20))
"""Settings worth timing: 4, 8 and 16 blocks for the 297 KiB of 151,936 bf16 logits."""


@lru_cache
def status() -> tuple[ctypes.CDLL | None, str]:
    """Return the library, or None, and what is active and why, for `python -m mr1_fast.env`."""
    library, reason = load(LIBRARY, "nvcc")
    if library is None:
        return None, reason
    library.mr1_cuda_error.restype = ctypes.c_char_p
    error, blocks = _ask_library(library, torch.bfloat16, 4096, 0)
    if error:
        return library, f"built, no GPU ({library.mr1_cuda_error(error).decode()})"
    if blocks == 0:
        return library, "built, off: this GPU has no thread block clusters (sm_90 or newer has)"
    if os.environ.get("MR1_FAST_CUDA") == "1":
        return library, "built, on"
    return library, "built, off: MR1_FAST_CUDA=1 turns it on"


def takes(logits: torch.Tensor) -> bool:
    """Tell whether `row_grpo` of these logits runs here rather than elsewhere."""
    if not logits.is_cuda or logits.dtype not in DTYPES:
        return False
    wanted = os.environ.get("MR1_FAST_CUDA")
    if wanted == "0":
        return False
    if wanted != "1":
        capability = torch.cuda.get_device_capability(logits.device)
        if capability not in FASTER_THAN_TRITON:
            return False

    row_bytes = logits.shape[1] * logits.element_size()
    stride_bytes = logits.stride(0) * logits.element_size()
    aligned = row_bytes % 16 == stride_bytes % 16 == logits.data_ptr() % 16 == 0
    if not aligned or status()[0] is None:
        return False
    error, blocks = cluster_blocks(logits, _tile(logits))
    return not error and blocks > 0 and len(logits) * blocks < 2**31  # the most that a grid has


def row_grpo(
    logits: torch.Tensor,
    targets: torch.Tensor,
    objective: Objective,
    results: RowResults,
    out: torch.Tensor | None,
    tile: ClusterTile | None = None,
) -> None:
    """`rows.row_grpo`; `tile` None: as tuned for this GPU, or by its shared memory.

    Raises RuntimeError if no cluster can hold a row, or with CUDA's own words if the launch fails.
    """
    library = status()[0]
    if library is None:
        raise RuntimeError(f"the native CUDA kernels are {status()[1]}")
    error, blocks = cluster_blocks(logits, _tile(logits) if tile is None else tile)
    _check(library, error)
    if blocks == 0:
        raise RuntimeError(
            f"no thread block cluster of this GPU can hold a row of {logits.shape[1]:,} logits "
            f"({logits.dtype}): leave MR1_FAST_CUDA unset"
        )
    arguments = grpo_arguments(logits, targets, objective, results, out, threads=0)
    with _on(logits.device):
        stream = torch.cuda.current_stream().cuda_stream if logits.is_cuda else None
        error = library.mr1_cuda_grpo_rows(ctypes.byref(arguments), blocks, ctypes.c_void_p(stream))
    _check(library, error)


def cluster_blocks(logits: torch.Tensor, tile: ClusterTile) -> tuple[int, int]:
    """Return CUDA's error, or 0, and how many thread blocks hold a row; 0 if no cluster can."""
    return _choose_blocks(logits.device, logits.dtype, logits.shape[1], tile.part_kib * 1024)


@lru_cache
def _choose_blocks(
    device: torch.device, dtype: torch.dtype, v: int, part_bytes: int
) -> tuple[int, int]:
    with _on(device):
        return _ask_library(status()[0], dtype, v, part_bytes)


def _ask_library(
    library: ctypes.CDLL, dtype: torch.dtype, v: int, part_bytes: int
) -> tuple[int, int]:
    """Call `mr1_cuda_grpo_blocks`, for the current device."""
    blocks = ctypes.c_int(0)
    sizes = ctypes.c_int64(v), ctypes.c_int64(part_bytes)
    error = library.mr1_cuda_grpo_blocks(DTYPES[dtype], *sizes, ctypes.byref(blocks))
    return error, blocks.value


def _tile(logits: torch.Tensor) -> ClusterTile:
    return tuned("grpo_cuda", logits.device, ClusterTile(0))


def _on(device: torch.device):
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def _check(library: ctypes.CDLL, error: int) -> None:
    if error:
        words = library.mr1_cuda_error(error).decode()
        raise RuntimeError(f"the native CUDA kernel did not start: {words}")
