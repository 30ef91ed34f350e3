"""Loading the libraries that setup.py builds from csrc/, and calling them through ctypes.

They are plain C without torch's headers, so one build serves every version of torch and Python. Two
environment variables act on the CPU library: MR1_FAST_NATIVE=0 turns it off, MR1_FAST_ISA forces an
instruction set.
"""

import ctypes
import os
import warnings
from functools import lru_cache
from pathlib import Path

import torch

from .csrc_digest import csrc_digest

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
"""The dtypes that the kernels take, by their number in csrc/row_kernels.h."""

LIBRARY = Path(__file__).parent.parent / "_cpu.so"
CSRC = Path(__file__).parents[2] / "csrc"
"""The libraries' sources in a checkout; an installed wheel has none, and its own libraries."""


def load(library: Path, compiler: str) -> tuple[ctypes.CDLL | None, str]:
    """Load a library; return it and "", or None and the reason. `compiler` names what builds it."""
    if not library.exists():
        reason = f"{compiler} was not found or failed when mr1_fast was installed"
        return None, f"not built: no {library.name}, as {reason}"
    try:
        loaded = ctypes.CDLL(str(library))
    except OSError as error:
        return None, f"not loadable: {error}"
    if (CSRC / "decode.h").exists() and _sources_of(loaded) != csrc_digest(CSRC):
        return None, f"not of these sources: {library.name} is out of date, run `pip install -e .`"
    return loaded, ""


def _sources_of(library: ctypes.CDLL) -> int | None:
    """Return the number of the sources that a library was built from, or None if it has none."""
    try:
        library.mr1_sources.restype = ctypes.c_uint64
    except AttributeError:
        return None
    return library.mr1_sources()


@lru_cache
def status() -> tuple[ctypes.CDLL | None, str]:
    """Return the CPU library, or None, and what is active and why, for `python -m mr1_fast.env`.

    Warns once where the library is missing; PyTorch then takes its place. Raises ValueError if
    MR1_FAST_ISA names an instruction set that this machine or build cannot run.
    """
    if os.environ.get("MR1_FAST_NATIVE") == "0":
        return None, "off, as MR1_FAST_NATIVE=0 says"
    library, reason = load(LIBRARY, "a C++ compiler")
    if library is None:
        warnings.warn(f"mr1_fast's native CPU kernels are {reason}; using PyTorch.", stacklevel=2)
        return None, reason

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
    """Return GOMP_parallel of the OpenMP library that torch has loaded; None if it is not GNU's."""
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
    """Return the address of a tensor's first element; null for None."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
