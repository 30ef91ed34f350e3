"""The row operations of grpo_loss.py on a CPU, by csrc/'s native kernels: loading the library and calling it.

The library is plain C behind ctypes, so one build serves every torch and Python. Where it was not built, or is turned
off with MR1_FAST_NATIVE=0, the PyTorch path takes its place. MR1_FAST_ISA forces an instruction set.
"""

import ctypes
import os
import warnings
from functools import lru_cache
from pathlib import Path

import torch

from .grpo_loss import SURROGATES, Objective, RowResults

DTYPES = {torch.float32: 0, torch.bfloat16: 1, torch.float16: 2}
LIBRARY = Path(__file__).parent.parent / "_cpu.so"


class _LossSettings(ctypes.Structure):
    """`LossSettings` of csrc/grpo_token.h."""

    _fields_ = [
        *(
            (name, ctypes.c_float)
            for name in ("beta", "clip_low", "clip_high", "delta", "tau_positive", "tau_negative")
        ),
        ("surrogate", ctypes.c_int),
        ("bias_corrected_kl", ctypes.c_int),
    ]


class _GrpoArguments(ctypes.Structure):
    """`GrpoArguments` of csrc/grpo_token.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("logits", "out")),
        *((name, ctypes.c_int64) for name in ("stride", "out_stride", "n", "v")),
        *((name, ctypes.c_void_p) for name in ("targets", "advantages", "token_weights", "old_logp", "ref_logp")),
        *((name, ctypes.c_void_p) for name in ("is_weights", "beta", "temperature")),
        *((name, ctypes.c_void_p) for name in ("loss", "logp", "entropy", "kl", "clipped", "kl_limited")),
        ("settings", _LossSettings),
        ("dtype", ctypes.c_int),
        ("threads", ctypes.c_int),
    ]


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
        warnings.warn(f"mr1_fast's native CPU kernels cannot be loaded ({error}); using PyTorch.", stacklevel=2)
        return None, f"not loadable: {error}"
    library.mr1_instruction_set.restype = ctypes.c_char_p
    wanted = os.environ.get("MR1_FAST_ISA")
    if wanted and library.mr1_use_instruction_set(wanted.encode()):
        raise ValueError(f"MR1_FAST_ISA is {wanted!r}, which this machine or build cannot run: leave it unset")
    name = library.mr1_instruction_set().decode()
    openmp = _torch_openmp()
    library.mr1_use_openmp(openmp)
    threads = "torch's threads" if openmp else "threads of its own"
    return library, f"{name}{' (MR1_FAST_ISA)' if wanted else ''}, {threads}"


def _torch_openmp() -> ctypes.c_void_p | None:
    """GOMP_parallel of the OpenMP library that torch has loaded; None where it is not GNU's or cannot be found."""
    try:
        paths = {line.split(maxsplit=5)[-1].strip() for line in Path("/proc/self/maps").read_text().splitlines()}
        path = next(path for path in sorted(paths) if "libgomp" in path and "torch" in path)
        return ctypes.cast(ctypes.CDLL(path).GOMP_parallel, ctypes.c_void_p)
    except (OSError, StopIteration, AttributeError):
        return None


def takes(logits: torch.Tensor) -> bool:
    """Whether the native kernels handle these logits."""
    return logits.device.type == "cpu" and logits.dtype in DTYPES and status()[0] is not None


def row_grpo(
    logits: torch.Tensor, targets: torch.Tensor, objective: Objective, results: RowResults, out: torch.Tensor | None
) -> None:
    """`grpo_loss.row_grpo`."""
    arguments = grpo_arguments(logits, targets, objective, results, out, torch.get_num_threads())
    status()[0].mr1_grpo_rows(ctypes.byref(arguments))


def grpo_arguments(
    logits: torch.Tensor, targets: torch.Tensor, objective: Objective, results: RowResults, out, threads: int
) -> ctypes.Structure:
    """The C structure of a call; every tensor is on one device, and per-row ones are contiguous."""
    return _GrpoArguments(
        pointer(logits), pointer(out), logits.stride(0), 0 if out is None else out.stride(0), *logits.shape,
        *map(pointer, (targets, objective.advantages, objective.token_weights, objective.old_logp)),
        *map(pointer, (objective.ref_logp, objective.is_weights, objective.beta, objective.temperature)),
        *map(pointer, results),
        _LossSettings(0.0, *objective.bounds, SURROGATES.index(objective.surrogate), objective.bias_corrected_kl),
        DTYPES[logits.dtype], threads,
    )  # fmt: skip


def row_logprobs(logits: torch.Tensor, targets: torch.Tensor, temperature: torch.Tensor) -> tuple[torch.Tensor, ...]:
    """`grpo_loss.row_logprobs`."""
    outputs = tuple(logits.new_empty(len(logits), dtype=torch.float32) for _ in range(4))
    status()[0].mr1_logprob_rows(
        *_matrix(logits), *_sizes(logits), *map(pointer, (targets, temperature, *outputs)), torch.get_num_threads()
    )
    return outputs


def row_logprobs_backward(
    logits, targets, temperature, entropy, peak, log_sum, grad_logp, grad_entropy, out: torch.Tensor
) -> None:
    """`grpo_loss.row_logprobs_backward`."""
    per_row = (targets, temperature, entropy, peak, log_sum, grad_logp, grad_entropy)
    status()[0].mr1_logprob_rows_backward(
        *_matrix(logits), *_matrix(out), *_sizes(logits), *map(pointer, per_row), torch.get_num_threads()
    )


def pointer(tensor: torch.Tensor | None) -> ctypes.c_void_p:
    """The address of a tensor's first element, or null."""
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())


def _matrix(tensor: torch.Tensor) -> tuple:
    return pointer(tensor), ctypes.c_int64(tensor.stride(0))


def _sizes(logits: torch.Tensor) -> tuple:
    return *map(ctypes.c_int64, logits.shape), DTYPES[logits.dtype]
