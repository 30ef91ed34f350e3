"""The row operations that every operator is built from, each on the kernels that take its logits."""

from types import ModuleType

import torch

from ..dispatch import statistics_dtype, use_triton
from .objective import BANNED, Objective, RowResults
from .rows_torch import _blocks, _row_grpo_block, _statistics


def backend(logits: torch.Tensor) -> ModuleType | None:
    """The module whose row operations take these logits; None: the PyTorch ones below."""
    if use_triton(logits):
        from . import rows_triton

        return rows_triton
    if logits.device.type == "cpu":
        from . import rows_native

        return rows_native if rows_native.takes(logits) else None
    return None


def row_logprobs(
    logits: torch.Tensor, targets: torch.Tensor, temperature: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Log-probability of the target, entropy, and what the backward needs: the row's largest logit and log Σ, (N,).

    log p_j = (x_j − peak)/T − log_sum. Kept apart, the two lose nothing; their sum would round.
    """
    targets = targets.contiguous()
    if module := backend(logits):
        return module.row_logprobs(logits, targets, temperature)
    outputs = tuple(logits.new_empty(len(logits), dtype=statistics_dtype(logits)) for _ in range(4))
    for rows in _blocks(logits):
        for output, value in zip(
            outputs, _statistics(logits[rows], targets[rows], temperature)[:4], strict=True
        ):
            output[rows] = value
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
    """Write the gradient by the logits into `out` (N, V), which may be the logits themselves.

    A row whose incoming gradients are 0 or not finite, or whose logits hold NaN, gets exactly 0: what is wrong with it
    shows in its log-prob.
    """
    targets = targets.contiguous()
    grad_logp, grad_entropy = (g.nan_to_num(0.0, 0.0, 0.0) for g in (grad_logp, grad_entropy))
    if module := backend(logits):
        module.row_logprobs_backward(
            logits, targets, temperature, entropy, peak, log_sum, grad_logp, grad_entropy, out
        )
        return
    for rows in _blocks(logits):
        logp = (logits[rows] - peak[rows, None]).div_(temperature).sub_(log_sum[rows, None])
        p = logp.exp()
        # d entropy / dz_j = −p_j·(log p_j + entropy); −inf is a finite number here, so that 0·log 0 = 0
        logp.clamp_(min=BANNED).add_(entropy[rows, None]).mul_(grad_entropy[rows, None])
        p.mul_(logp.add_(grad_logp[rows, None])).neg_()
        p.scatter_add_(1, targets[rows, None], grad_logp[rows, None])
        dead = ((grad_logp[rows] == 0) & (grad_entropy[rows] == 0)) | ~log_sum[rows].isfinite()
        out[rows] = p.div_(temperature).masked_fill_(dead[:, None], 0.0)


def row_grpo(
    logits: torch.Tensor,
    targets: torch.Tensor,
    objective: Objective,
    results: RowResults,
    out: torch.Tensor | None,
) -> None:
    """Fill `results`, and write the gradient of Σ loss by the logits into `out` (N, V), unless that is None.

    `out` may be the logits themselves. A row whose derivative is 0 or not finite (NaN logits, an infinite ratio) gets
    a gradient of exactly 0: the loss reports it, the weights do not suffer from it.
    """
    targets = targets.contiguous()
    if module := backend(logits):
        if logits.is_cuda:
            from . import rows_cuda

            module = rows_cuda if rows_cuda.takes(logits) else module
        module.row_grpo(logits, targets, objective, results, out)
        return
    for rows in _blocks(logits):
        _row_grpo_block(
            logits[rows], targets[rows], objective.rows(rows), results.rows(rows), out, rows
        )


def scale_(gradient: torch.Tensor, factor: torch.Tensor) -> None:
    """Multiply in place by a 0-d tensor; where that is 1, the gradient is not touched (and nothing is synchronised)."""
    if use_triton(gradient) and gradient.is_contiguous():
        from . import rows_triton

        rows_triton.scale_(gradient, factor)
    elif gradient.is_cuda or factor.item() != 1:
        gradient.mul_(factor)
