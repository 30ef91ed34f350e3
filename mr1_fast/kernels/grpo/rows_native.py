"""The row operations of grpo_loss.py on a CPU, by csrc/'s native kernels: loading the library and calling it.

The library is plain C behind ctypes, so one build serves every torch and Python. Where it was not built, or is turned
off with MR1_FAST_NATIVE=0, the PyTorch path takes its place. MR1_FAST_ISA forces an instruction set.
"""

import ctypes

import torch

from ..native import DTYPES, pointer, status
from .objective import SURROGATES, Objective, RowResults


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
        *(
            (name, ctypes.c_void_p)
            for name in ("targets", "advantages", "token_weights", "old_logp", "ref_logp")
        ),
        *((name, ctypes.c_void_p) for name in ("is_weights", "beta", "temperature")),
        *(
            (name, ctypes.c_void_p)
            for name in ("loss", "logp", "entropy", "kl", "clipped", "kl_limited")
        ),
        ("settings", _LossSettings),
        ("dtype", ctypes.c_int),
        ("threads", ctypes.c_int),
    ]


def takes(logits: torch.Tensor) -> bool:
    """Whether the native kernels handle these logits."""
    return logits.device.type == "cpu" and logits.dtype in DTYPES and status()[0] is not None


def row_grpo(
    logits: torch.Tensor,
    targets: torch.Tensor,
    objective: Objective,
    results: RowResults,
    out: torch.Tensor | None,
) -> None:
    """`grpo_loss.row_grpo`."""
    arguments = grpo_arguments(logits, targets, objective, results, out, torch.get_num_threads())
    status()[0].mr1_grpo_rows(ctypes.byref(arguments))


def grpo_arguments(
    logits: torch.Tensor,
    targets: torch.Tensor,
    objective: Objective,
    results: RowResults,
    out,
    threads: int,
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


def row_logprobs(
    logits: torch.Tensor, targets: torch.Tensor, temperature: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """`grpo_loss.row_logprobs`."""
    outputs = tuple(logits.new_empty(len(logits), dtype=torch.float32) for _ in range(4))
    status()[0].mr1_logprob_rows(
        *_matrix(logits),
        *_sizes(logits),
        *map(pointer, (targets, temperature, *outputs)),
        torch.get_num_threads(),
    )
    return outputs


def row_logprobs_backward(
    logits, targets, temperature, entropy, peak, log_sum, grad_logp, grad_entropy, out: torch.Tensor
) -> None:
    """`grpo_loss.row_logprobs_backward`."""
    per_row = (targets, temperature, entropy, peak, log_sum, grad_logp, grad_entropy)
    status()[0].mr1_logprob_rows_backward(
        *_matrix(logits),
        *_matrix(out),
        *_sizes(logits),
        *map(pointer, per_row),
        torch.get_num_threads(),
    )


def _matrix(tensor: torch.Tensor) -> tuple:
    return pointer(tensor), ctypes.c_int64(tensor.stride(0))


def _sizes(logits: torch.Tensor) -> tuple:
    return *map(ctypes.c_int64, logits.shape), DTYPES[logits.dtype]
