"""The fused loss on CUDA by csrc/fused_grpo_cuda.cu, an alternative to the Triton kernel of the same operation.

Not the default anywhere until a benchmark on that architecture says so (benchmarks/bench_grpo_loss.py); turn it on with
MR1_FAST_CUDA=1. It needs rows of a multiple of 16 bytes. Other row operations stay in Triton.
"""

import ctypes
import os
from contextlib import nullcontext
from functools import lru_cache
from pathlib import Path

import torch

from ..native import DTYPES, pointer
from .objective import Objective, RowResults
from .rows_native import grpo_arguments

LIBRARY = Path(__file__).parents[2] / "_cuda.so"
FASTER_THAN_TRITON: frozenset[tuple[int, int]] = frozenset()
"""Compute capabilities where the benchmark found it so; none is measured yet."""
CLUSTERS = ((9, 0), (12, 0))
"""Compute capabilities, from and below, whose thread blocks form clusters with 227 KB of shared memory."""


@lru_cache
def status() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None, and what is active and why."""
    if not LIBRARY.exists():
        return (
            None,
            f"not built: no {LIBRARY.name}, as nvcc was not found or failed when mr1_fast was installed",
        )
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        return None, f"not loadable: {error}"
    library.mr1_cuda_error.restype = ctypes.c_char_p
    count = ctypes.c_int(0)
    error = library.mr1_cuda_device_count(ctypes.byref(count))
    if error:
        return library, f"built, no GPU ({library.mr1_cuda_error(error).decode()})"
    return library, "built, on" if os.environ.get(
        "MR1_FAST_CUDA"
    ) == "1" else "built, off: MR1_FAST_CUDA=1 turns it on"


def takes(logits: torch.Tensor) -> bool:
    """Whether `row_grpo` of these logits, on a GPU, runs here rather than in Triton."""
    if logits.dtype not in DTYPES or logits.shape[1] * logits.element_size() % 16:
        return False
    wanted = os.environ.get("MR1_FAST_CUDA")
    if wanted == "0" or (
        wanted != "1" and torch.cuda.get_device_capability(logits.device) not in FASTER_THAN_TRITON
    ):
        return False
    if (
        logits.shape[1] * logits.element_size() > 8 * 220 * 1024
    ):  # more than the shared memory of 8 blocks
        return False
    return (
        logits.stride(0) * logits.element_size() % 16 == 0
        and logits.data_ptr() % 16 == 0
        and bool(status()[0])
    )


def row_grpo(
    logits: torch.Tensor,
    targets: torch.Tensor,
    objective: Objective,
    results: RowResults,
    out: torch.Tensor | None,
) -> None:
    """`grpo_loss.row_grpo`; RuntimeError with CUDA's own words if the launch fails."""
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
        if not clusters:  # a group of rows fills half of L2; its parts fill the multiprocessors
            rows = max(
                1, properties.L2_cache_size // 2 // (logits.shape[1] * logits.element_size())
            )
            rows = min(rows, 65_535)  # of a grid's second axis
            parts = max(1, 3 * properties.multi_processor_count // rows)
            scratch = torch.empty((12 * parts + 4) * rows, dtype=torch.uint8, device=logits.device)
    with device:
        error = library.mr1_cuda_grpo_rows(
        ctypes.byref(arguments), int(clusters), pointer(scratch), ctypes.c_int64(rows), parts,
        ctypes.c_void_p(stream),
    )  # fmt: skip
    if error:
        raise RuntimeError(
            f"the native CUDA kernel did not start: {library.mr1_cuda_error(error).decode()}"
        )
