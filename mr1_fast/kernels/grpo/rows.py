"""The row operations that every operator is built from, each on the kernels that take its logits.

Four modules offer them under the same names: rows_torch anywhere, rows_triton on a GPU, rows_native
on a CPU, and rows_cuda, which has `row_grpo` alone. What each operation does is said here, once.
"""

from types import ModuleType

import torch

from ..dispatch import use_triton
from . import rows_cuda, rows_native, rows_torch
from .objective import Objective, RowResults


def kernels_for(logits: torch.Tensor) -> ModuleType:
    """Return the module whose row operations take these logits."""
    if use_triton(logits):
        from . import rows_triton  # here, as Triton exists for Linux alone

        return rows_triton
    return rows_native if rows_native.takes(logits) else rows_torch


def row_logprobs(
    logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: torch.Tensor,
    token_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return log-probability of the target, entropy, peak and log_sum of each row, (N,) each.

    The last two are what the backward needs: peak is the row's largest logit, log_sum the logarithm
    of Σ exp((x_j − peak)/T), so that log p_j = (x_j − peak)/T − log_sum. Kept apart, they lose
    nothing; their sum would round.

    A row whose entry in `token_weights` (N,), contiguous and in the dtype of statistics, is 0 is
    not read: its log-probability and entropy are exactly 0, and its target may be any number. Other
    weights change nothing. None: every row is read.
    """
    return kernels_for(logits).row_logprobs(
        logits, targets.contiguous(), temperature, token_weights
    )


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
    """Write the gradient by the logits into `out` (N, V), which may be the logits themselves.

    A row whose incoming gradients are 0 is not read, and gets a gradient of exactly 0. So does a
    row whose incoming gradients are not finite, or whose logits hold NaN: what is wrong with it
    shows in its log-probability.
    """
    grad_logp, grad_entropy = (g.nan_to_num(0.0, 0.0, 0.0) for g in (grad_logp, grad_entropy))
    kernels_for(logits).row_logprobs_backward(
        logits,
        targets.contiguous(),
        temperature,
        entropy,
        peak,
        log_sum,
        grad_logp,
        grad_entropy,
        out,
    )


def row_grpo(
    logits: torch.Tensor,
    targets: torch.Tensor,
    objective: Objective,
    results: RowResults,
    out: torch.Tensor | None,
) -> None:
    """Fill `results`; write the gradient of Σ loss by the logits into `out` (N, V), unless None.

    `out` may be the logits themselves. A row whose derivative is 0 or not finite (NaN logits, an
    infinite ratio) gets a gradient of exactly 0: the loss reports it, the weights do not suffer
    from it.
    """
    kernels = rows_cuda if rows_cuda.takes(logits) else kernels_for(logits)
    kernels.row_grpo(logits, targets.contiguous(), objective, results, out)


def scale_(gradient: torch.Tensor, factor: torch.Tensor) -> None:
    """Multiply in place by a 0-d tensor; where that is 1, leave the gradient untouched.

    On a GPU nothing synchronises.
    """
    kernels = rows_torch
    if use_triton(gradient) and gradient.is_contiguous():
        kernels = kernels_for(gradient)
    kernels.scale_(gradient, factor)
