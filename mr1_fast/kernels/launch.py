"""Launching Triton kernels."""

from contextlib import nullcontext

import torch
import triton
from triton.runtime import driver

MOST_PROGRAMS = 2**31 - 1
"""Programs that the first axis of a CUDA grid can hold."""


def launch(kernel, grid: tuple[int, ...], device: torch.device, *args, **options) -> None:
    """Run a Triton kernel over `grid` on the GPU that holds its tensors.

    That GPU need not be the current one. `options` are the kernel's compile-time arguments and
    Triton's own, such as `num_warps`. An empty grid is no launch. Raises ValueError for a grid that
    is larger than CUDA allows.
    """
    if 0 in grid:
        return
    if grid[0] > MOST_PROGRAMS:
        raise ValueError(
            f"the launch needs {grid[0]} programs, more than a grid holds ({MOST_PROGRAMS}): work "
            "on less at a time"
        )
    with torch.cuda.device(device) if device.type == "cuda" else nullcontext():
        kernel[grid](*args, **options)


def most_registers(count: int) -> dict[str, int]:
    """Return the option of a launch for the most registers of a thread; AMD's compiler has none."""
    if triton.knobs.runtime.interpret or driver.active.get_current_target().backend != "cuda":
        return {}
    return {"maxnreg": count}
