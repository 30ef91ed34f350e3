"""`row_grpo` on a GPU by csrc/fused_grpo_cuda.cu, an alternative to the Triton kernel.

It is the default on an architecture only once a benchmark there says so
(benchmarks/bench_grpo_loss.py); MR1_FAST_CUDA=1 turns it on anywhere, MR1_FAST_CUDA=0 off. It needs
rows whose bytes are a multiple of 16. The other row operations stay in Triton.
"""

import ctypes
import os
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path

import torch

from ..native import DTYPES, load, pointer
from .objective import Objective, RowResults
from .rows_native import grpo_arguments

LIBRARY = Path(__file__).parents[2] / "_cuda.so"

FASTER_THAN_TRITON: frozenset[tuple[int, int]] = frozenset()
"""Compute capabilities on which the benchmark found it faster; none so far."""

CLUSTERS = ((9, 0), (12, 0))
"""Compute capabilities, from and below, whose thread blocks form clusters.

Each block then has 227 KB of shared memory.
"""

LONGEST_ROW = 8 * 220 * 1024
"""Bytes of a row that the shared memory of the 8 blocks of a cluster holds."""


@lru_cache
def status() -> tuple[ctypes.CDLL | None, str]:
    """Return the library, or None, and what is active and why, for `python -m mr1_fast.env`."""
    library, reason = load(LIBRARY, "nvcc")
    if library is None:
        return None, reason
    library.mr1_cuda_error.restype = ctypes.c_char_p
    error = library.mr1_cuda_device_count(ctypes.byref(ctypes.c_int(0)))
    if error:
        return library, f"built, no GPU ({library.mr1_cuda_error(error).decode()})"
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
    return aligned and row_bytes <= LONGEST_ROW and status()[0] is not None


def row_grpo(
    logits: torch.Tensor,
    targets: torch.Tensor,
    objective: Objective,
    results: RowResults,
    out: torch.Tensor | None,
) -> None:
    """`rows.row_grpo`; raises RuntimeError with CUDA's own words if the launch fails."""
    library = status()[0]
    if library is None:
        raise RuntimeError(f"the native CUDA kernels are {status()[1]}")
    arguments = grpo_arguments(logits, targets, objective, results, out, threads=0)
    clusters, rows, parts = False, 1, 1
    scratch = stream = None
    device = nullcontext()
    if logits.is_cuda:
        device = torch.cuda.device(logits.device)
        stream = torch.cuda.current_stream(logits.device).cuda_stream
        properties = torch.cuda.get_device_properties(logits.device)
        clusters = CLUSTERS[0] <= (properties.major, properties.minor) < CLUSTERS[1]
        if not clusters:
            # A group of rows fills half of L2; the parts of its rows fill the multiprocessors.
            row_bytes = logits.shape[1] * logits.element_size()
            rows = max(1, properties.L2_cache_size // 2 // row_bytes)
            rows = min(rows, 65_535)  # the most that the second axis of a grid holds
            parts = max(1, 3 * properties.multi_processor_count // rows)
            scratch = torch.empty((12 * parts + 4) * rows, dtype=torch.uint8, device=logits.device)
    with device:
        error = library.mr1_cuda_grpo_rows(
            ctypes.byref(arguments),
            int(clusters),
            pointer(scratch),
            ctypes.c_int64(rows),
            parts,
            ctypes.c_void_p(stream),
        )
    if error:
        words = library.mr1_cuda_error(error).decode()
        raise RuntimeError(f"the native CUDA kernel did not start: {words}")
