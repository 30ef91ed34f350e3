"""The row operations on PyTorch, for tensors that no kernel takes."""

from collections.abc import Iterator

import torch

from ..dispatch import statistics_dtype
from .objective import BANNED, KL_LOG_RATIO_LIMIT, Objective, RowResults
from .reference import policy_loss_ref

BLOCK_ELEMENTS = 2**20
"""Logits that the PyTorch path works on at a time, so that its temporaries stay in the cache and small."""


def _blocks(logits: torch.Tensor) -> Iterator[slice]:
    size = max(1, BLOCK_ELEMENTS // logits.shape[1])
    return (slice(start, min(start + size, len(logits))) for start in range(0, len(logits), size))


def _statistics(
    logits: torch.Tensor, targets: torch.Tensor, temperature: torch.Tensor
) -> tuple[torch.Tensor, ...]:
    """What `row_logprobs` returns, (n,) each, and the probabilities (n, V)."""
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
    logits, targets, objective: Objective, results: RowResults, out, rows: slice
) -> None:
    logp, entropy, _, _, p = _statistics(logits, targets, objective.temperature)
    clip_low, clip_high, delta, *sapo_temperatures = objective.bounds
    per_token, kl, clipped, kl_limited = policy_loss_ref(
        logp,
        objective.advantages,
        objective.token_weights,
        beta=objective.beta,
        old_logp=objective.old_logp,
        ref_logp=objective.ref_logp,
        clip_low=clip_low,
        clip_high=clip_high,
        delta=delta,
        surrogate=objective.surrogate,
        sapo_temperatures=tuple(sapo_temperatures),
        is_weights=objective.is_weights,
        bias_corrected_kl=objective.bias_corrected_kl,
    )
    for result, value in zip(
        results, (per_token, logp, entropy, kl, clipped, kl_limited), strict=True
    ):
        result.copy_(value)
    if out is None:
        return
    derivative = _derivative(logp, objective, clipped, kl_limited)
    dead = (derivative == 0) | ~derivative.isfinite()
    coefficient = (derivative / objective.temperature).unsqueeze(-1)
    p.mul_(-coefficient).scatter_add_(1, targets.unsqueeze(-1), coefficient)
    out[rows] = p.masked_fill_(dead.unsqueeze(-1), 0.0)


def _derivative(logp: torch.Tensor, objective: Objective, clipped, kl_limited) -> torch.Tensor:
    """(n,) derivative of `policy_loss_ref` by logp in closed form: autograd does not run inside an operator."""
    advantages = objective.advantages
    _, clip_high, _, *sapo_temperatures = objective.bounds
    ratio = torch.exp(logp - (logp if objective.old_logp is None else objective.old_logp))
    if objective.surrogate == "clip":
        derivative = torch.where(clipped, 0.0, -ratio * advantages)
    elif objective.surrogate == "cispo":
        derivative = -ratio.clamp(max=1 + clip_high) * advantages
    else:
        tau = torch.where(
            advantages > 0, *(torch.full_like(advantages, each) for each in sapo_temperatures)
        )
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
