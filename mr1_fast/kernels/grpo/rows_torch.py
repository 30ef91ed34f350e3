"""The row operations in PyTorch, for logits that no kernel takes.

Those are in fp64, or on a CPU without the native library. The operations go over blocks of rows, so
that temporaries are small and stay in the cache.
"""

from collections.abc import Iterator

import torch

from ..dispatch import statistics_dtype
from .objective import BANNED, KL_LOG_RATIO_LIMIT, Objective, RowResults
from .reference import objective_loss_ref

BLOCK_ELEMENTS = 2**20
"""Logits of a block."""


def row_logprobs(
    logits: torch.Tensor,
    targets: torch.Tensor,
    temperature: torch.Tensor,
    token_weights: torch.Tensor | None = None,
) -> tuple[torch.Tensor, ...]:
    """`rows.row_logprobs`, block by block."""
    outputs = tuple(logits.new_empty(len(logits), dtype=statistics_dtype(logits)) for _ in range(4))
    masked = None if token_weights is None else token_weights == 0
    if masked is not None:
        targets = targets.masked_fill(masked, 0)
    for rows in _blocks(logits, masked):
        *values, _ = _statistics(logits[rows], targets[rows], temperature)
        for output, value in zip(outputs, values, strict=True):
            output[rows] = value
    if masked is not None:
        outputs = tuple(output.masked_fill_(masked, 0.0) for output in outputs)
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
    """`rows.row_logprobs_backward`, block by block."""
    dead = ((grad_logp == 0) & (grad_entropy == 0)) | ~log_sum.isfinite()
    targets = targets.masked_fill(dead, 0)
    for rows in _blocks(logits, dead):
        logp = (logits[rows] - peak[rows, None]).div_(temperature).sub_(log_sum[rows, None])
        p = logp.exp()
        # d entropy / dz_j = −p_j·(log p_j + entropy), where −inf becomes finite: 0·log 0 = 0.
        logp.clamp_(min=BANNED).add_(entropy[rows, None]).mul_(grad_entropy[rows, None])
        p.mul_(logp.add_(grad_logp[rows, None])).neg_()
        p.scatter_add_(1, targets[rows, None], grad_logp[rows, None])
        out[rows] = p.div_(temperature).to(out.dtype)
    out.masked_fill_(dead[:, None], 0.0)


def row_grpo(
    logits: torch.Tensor,
    targets: torch.Tensor,
    objective: Objective,
    results: RowResults,
    out: torch.Tensor | None,
) -> None:
    """`rows.row_grpo`, block by block."""
    for rows in _blocks(logits):
        _row_grpo_block(
            logits[rows],
            targets[rows],
            objective.rows(rows),
            results.rows(rows),
            None if out is None else out[rows],
        )


def scale_(gradient: torch.Tensor, factor: torch.Tensor) -> None:
    """`rows.scale_`; on a GPU, where reading the factor would synchronise, it multiplies always."""
    if gradient.is_cuda or factor.item() != 1:
        gradient.mul_(factor)


def _blocks(
    logits: torch.Tensor, masked: torch.Tensor | None = None
) -> Iterator[slice | torch.Tensor]:
    """Return the rows of each block, as an index.

    On a CPU, rows that are `masked` are left out. On a GPU, finding them would synchronise: there,
    they are among the others, and the caller replaces what comes of them.
    """
    size = max(1, BLOCK_ELEMENTS // logits.shape[1])
    if masked is not None and not masked.is_cuda and masked.any():
        return iter((~masked).nonzero().squeeze(-1).split(size))
    return (slice(start, min(start + size, len(logits))) for start in range(0, len(logits), size))


def _statistics(
    logits: torch.Tensor, targets: torch.Tensor, temperature: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """Return what `row_logprobs` does, (n,) each, and the probabilities (n, V)."""
    x = logits.to(statistics_dtype(logits))
    peak = x.amax(-1)
    z = (x - peak.unsqueeze(-1)).div_(temperature)
    log_sum = z.logsumexp(-1)
    logp = z.sub_(log_sum.unsqueeze(-1))
    p = logp.exp()
    chosen = logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1)
    entropy = -logp.clamp_(min=BANNED).mul_(p).sum(-1)  # 0·log 0 = 0
    return chosen, entropy, peak, log_sum, p


def _row_grpo_block(
    logits: torch.Tensor,
    targets: torch.Tensor,
    objective: Objective,
    results: RowResults,
    out: torch.Tensor | None,
) -> None:
    logp, entropy, _, _, p = _statistics(logits, targets, objective.temperature)
    per_token, kl, clipped, kl_limited = objective_loss_ref(logp, objective)
    values = RowResults(per_token, logp, entropy, kl, clipped, kl_limited)
    for result, value in zip(results, values, strict=True):
        result.copy_(value)
    if out is None:
        return

    derivative = _derivative(logp, objective, clipped, kl_limited)
    dead = (derivative == 0) | ~derivative.isfinite()
    coefficient = (derivative / objective.temperature).unsqueeze(-1)
    p.mul_(-coefficient).scatter_add_(1, targets.unsqueeze(-1), coefficient)
    out.copy_(p.masked_fill_(dead.unsqueeze(-1), 0.0))


def _derivative(
    logp: torch.Tensor, objective: Objective, clipped: torch.Tensor, kl_limited: torch.Tensor
) -> torch.Tensor:
    """Return the derivative (n,) of the reference's loss by logp, in closed form.

    Autograd does not run inside an operator.
    """
    advantages = objective.advantages
    ratio = torch.exp(logp - (logp if objective.old_logp is None else objective.old_logp))
    if objective.surrogate == "clip":
        derivative = torch.where(clipped, 0.0, -ratio * advantages)
    elif objective.surrogate == "cispo":
        derivative = -ratio.clamp(max=1 + objective.clip_high) * advantages
    else:
        positive = torch.full_like(advantages, objective.tau_positive)
        negative = torch.full_like(advantages, objective.tau_negative)
        tau = torch.where(advantages > 0, positive, negative)
        gate = torch.sigmoid(tau * (ratio - 1))
        derivative = -4 * gate * (1 - gate) * ratio * advantages
    if objective.is_weights is not None:
        derivative = derivative * objective.is_weights

    if objective.ref_logp is not None:
        d = (objective.ref_logp - logp).clamp(-KL_LOG_RATIO_LIMIT, KL_LOG_RATIO_LIMIT)
        grown = torch.expm1(d)
        by_kl = torch.where(kl_limited, 0.0, -grown)
        if objective.bias_corrected_kl:
            by_kl = ratio * (by_kl + grown - d)
        derivative = derivative + objective.beta * by_kl
    return torch.where(objective.token_weights != 0, objective.token_weights * derivative, 0.0)
