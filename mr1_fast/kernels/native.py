"""csrc/'s native CPU kernels: loading the library behind ctypes."""

import ctypes
import os
import warnings
from functools import lru_cache
from pathlib import Path

import torch

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}


LIBRARY = Path(__file__).parent.parent / "_cpu.so"


@lru_cache
def status() -> tuple[ctypes.CDLL | None, str]:
    """The library, or None, and what is active and why, for `python -m mr1_fast.env`."""
    if os.environ.get("MR1_FAST_NATIVE") == "0":
        return None, "off, as MR1_FAST_NATIVE=0 says"
    if not LIBRARY.exists():
        why = f"not built: no {LIBRARY.name}, as a C++ compiler was not found or failed when mr1_fast was installed"
        warnings.warn(f"mr1_fast's native CPU kernels are {why}; using PyTorch.", stacklevel=2)
        return None, why
    try:
        library = ctypes.CDLL(str(LIBRARY))
    except OSError as error:
        warnings.warn(
            f"mr1_fast's native CPU kernels cannot be loaded ({error}); using PyTorch.",
            stacklevel=2,
        )
        return None, f"not loadable: {error}"
    library.mr1_instruction_set.restype = ctypes.c_char_p
    wanted = os.environ.get("MR1_FAST_ISA")
    if wanted and library.mr1_use_instruction_set(wanted.encode()):
        raise ValueError(
            f"MR1_FAST_ISA is {wanted!r}, which this machine or build cannot run: leave it unset"
        )
    name = library.mr1_instruction_set().decode()
    openmp = _torch_openmp()
    library.mr1_use_openmp(openmp)
    threads = "torch's threads" if openmp else "threads of its own"
    return library, f"{name}{' (MR1_FAST_ISA)' if wanted else ''}, {threads}"


def _torch_openmp() -> ctypes.c_void_p | None:
    """GOMP_parallel of the OpenMP library that torch has loaded; None where it is not GNU's or cannot be found."""
    try:
        paths = {
            line.split(maxsplit=5)[-1].strip()
            for line in Path("/proc/self/maps").read_text().splitlines()
        }
        path = next(path for path in sorted(paths) if "libgomp" in path and "torch" in path)
        return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, ctypes.c_void_p)
    except (OSError, StopIteration, AttributeError):
        return None


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    """The address of a tensor's first element, or null."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
