"""The row operations on a CPU, by the native kernels of csrc/row_kernels.cpp.

Where the library was not built or is turned off, rows_torch takes its place; see
`mr1_fast.kernels.native`.
"""

import ctypes

import torch

from ..native import DTYPES, pointer, status
from .objective import SURROGATES, Objective, RowResults


class _LossSettings(ctypes.Structure):
    """`LossSettings` of csrc/grpo_token.h."""

    _fields_ = [
        ("beta", ctypes.c_float),
        ("clip_low", ctypes.c_float),
        ("clip_high", ctypes.c_float),
        ("delta", ctypes.c_float),
        ("tau_positive", ctypes.c_float),
        ("tau_negative", ctypes.c_float),
        ("surrogate", ctypes.c_int),
        ("bias_corrected_kl", ctypes.c_int),
    ]


class _GrpoArguments(ctypes.Structure):
    """`GrpoArguments` of csrc/grpo_token.h."""

    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("logits", "out")),
        *((name, ctypes.c_int64) for name in ("stride", "out_stride", "n", "v")),
        *((name, ctypes.c_void_p) for name in ("targets", "advantages", "token_weights")),
        *((name, ctypes.c_void_p) for name in ("old_logp", "ref_logp", "is_weights")),
        *((name, ctypes.c_void_p) for name in ("beta", "temperature")),
        *((name, ctypes.c_void_p) for name in RowResults._fields),
        ("settings", _LossSettings),
        ("dtype", ctypes.c_int),
        ("threads", ctypes.c_int),
    ]


def takes(logits: torch.Tensor) -> bool:
    """Tell whether the native kernels handle these logits."""
    return logits.device.type == "cpu" and logits.dtype in DTYPES and status()[0] is not None


def row_grpo(
    logits: torch.Tensor,
    targets: torch.Tensor,
    objective: Objective,
    results: RowResults,
    out: torch.Tensor | None,
) -> None:
    """`rows.row_grpo`, on torch's number of threads."""
    arguments = grpo_arguments(logits, targets, objective, results, out, torch.get_num_threads())
    status()[0].mr1_grpo_rows(ctypes.byref(arguments))


def grpo_arguments(
    logits: torch.Tensor,
    targets: torch.Tensor,
    objective: Objective,
    results: RowResults,
    out: torch.Tensor | None,
    threads: int,
) -> ctypes.Structure:
    """Return the C structure of a call; all tensors are on one device, per-row ones contiguous."""
    settings = _LossSettings(
        beta=0.0,  # The kernels read the tensor instead.
        clip_low=objective.clip_low,
        clip_high=objective.clip_high,
        delta=objective.delta,
        tau_positive=objective.tau_positive,
        tau_negative=objective.tau_negative,
        surrogate=SURROGATES.index(objective.surrogate),
        bias_corrected_kl=objective.bias_corrected_kl,
    )
    rows, columns = logits.shape
    return _GrpoArguments(
        logits=pointer(logits),
        out=pointer(out),
        stride=logits.stride(0),
        out_stride=0 if out is None else out.stride(0),
        n=rows,
        v=columns,
        targets=pointer(targets),
        advantages=pointer(objective.advantages),
        token_weights=pointer(objective.token_weights),
        old_logp=pointer(objective.old_logp),
        ref_logp=pointer(objective.ref_logp),
        is_weights=pointer(objective.is_weights),
        beta=pointer(objective.beta),
        temperature=pointer(objective.temperature),
        **{name: pointer(result) for name, result in results._asdict().items()},
        settings=settings,
        dtype=DTYPES[logits.dtype],
        threads=threads,
    )


def row_logprobs(
    logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: torch.Tensor,
    token_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """`rows.row_logprobs`, on torch's number of threads."""
    outputs = tuple(logits.new_empty(len(logits), dtype=torch.float32) for _ in range(4))
    status()[0].mr1_logprob_rows(
        *_matrix(logits),
        *_sizes(logits),
        *map(pointer, (targets, temperature, token_weights, *outputs)),
        torch.get_num_threads(),
    )
    return outputs


def row_logprobs_backward(
    logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: torch.Tensor,
    entropy: torch.Tensor,
    peak: torch.Tensor,
    log_sum: torch.Tensor,
    grad_logp: torch.Tensor,
    grad_entropy: torch.Tensor,
    out: torch.Tensor,
) -> None:
    """`rows.row_logprobs_backward`, on torch's number of threads."""
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
