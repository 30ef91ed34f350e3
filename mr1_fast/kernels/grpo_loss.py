"""The clipped GRPO loss with its KL term, per token, from log-probabilities.

dtype contract: log-probabilities, KL and loss are fp32 (fp64 stays fp64) whatever the logits are. Near the start of
training the KL is 1e-3…1e-4, below what bf16 can resolve.

This file holds the reference: the specification of the fused kernels, their oracle and their baseline.
"""

from typing import NamedTuple

import torch

KL_LOG_RATIO_LIMIT = 20.0
"""Bound on |log π_ref − log π_θ| inside k3, whose exponential would overflow; exp(20) is already 5e8."""


class GRPOLoss(NamedTuple):
    """What one pass over the tokens yields; all but `loss` are detached."""

    loss: torch.Tensor
    """() Σ token_weights · (surrogate + β·k3)."""
    kl: torch.Tensor
    """(N,) k3 of each token."""
    clipped: torch.Tensor
    """(N,) bool: the clip took the gradient of the surrogate away."""
    kl_limited: torch.Tensor
    """(N,) bool: the log-ratio inside k3 hit its bound."""


def token_logprobs_ref(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target and entropy of each row, both (N,), from logits (N, V) / temperature."""
    logp = torch.log_softmax(logits.to(torch.promote_types(logits.dtype, torch.float32)) / temperature, dim=-1)
    # A banned token (−inf) has p·log p = 0, not 0·−inf.
    entropy = -torch.where(logp.isinf(), 0.0, logp.exp() * logp).sum(dim=-1)
    return logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1), entropy


def grpo_loss_ref(
    logp: torch.Tensor,
    advantages: torch.Tensor,
    token_weights: torch.Tensor,
    *,
    beta: float | torch.Tensor,
    old_logp: torch.Tensor | None = None,
    ref_logp: torch.Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
) -> GRPOLoss:
    """Σ_t w_t · [ −min(ρ_t Â_t, clip(ρ_t, 1−ε_low, 1+ε_high) Â_t) + β·k3_t ] (OThink-MR1, arXiv 2503.16081).

    ρ = exp(logp − old_logp) and k3 = exp(d) − d − 1 with d = ref_logp − logp. All tensors are (N,); `token_weights`
    carry the mask and every normalisation (1/|o_i|, 1/G, accumulation). `old_logp=None` means on-policy: ρ = 1 with
    its gradient kept. β = 0 needs no `ref_logp`, and k3 is then 0.
    A token of weight 0 contributes exactly 0, also where its ratio is inf or NaN.
    """
    counts = token_weights != 0
    logp = torch.where(counts, logp, 0.0)
    old_logp = logp.detach() if old_logp is None else torch.where(counts, old_logp, 0.0)
    ratio = torch.exp(logp - old_logp)
    clipped_ratio = ratio.clamp(1 - clip_low, 1 + clip_high)
    surrogate = -torch.minimum(ratio * advantages, clipped_ratio * advantages)
    clipped = ((ratio < 1 - clip_low) & (advantages < 0)) | ((ratio > 1 + clip_high) & (advantages > 0))

    if ref_logp is None:
        if not isinstance(beta, torch.Tensor) and beta != 0:
            raise ValueError(f"beta is {beta}, but ref_logp is None: pass the reference log-probs, or beta=0")
        kl, kl_limited = torch.zeros_like(logp), torch.zeros_like(counts)
    else:
        log_ratio = torch.where(counts, ref_logp, 0.0) - logp
        kl_limited = log_ratio.abs() > KL_LOG_RATIO_LIMIT
        log_ratio = log_ratio.clamp(-KL_LOG_RATIO_LIMIT, KL_LOG_RATIO_LIMIT)
        kl = torch.exp(log_ratio) - log_ratio - 1
    per_token = torch.where(counts, surrogate + beta * kl, 0.0)
    return GRPOLoss((token_weights * per_token).sum(), kl.detach(), clipped & counts, kl_limited)
