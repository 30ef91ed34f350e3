"""The equations of GRPO in PyTorch: the specification of all kernels, the oracle of their tests."""

import torch

from ..dispatch import statistics_dtype
from .objective import KL_LOG_RATIO_LIMIT, GRPOLoss, Objective


def token_logprobs_ref(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float | torch.Tensor = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return each target's log-probability and each row's entropy, (N,), at the temperature.

    `logits` are (N, V), `targets` (N,).
    """
    logp = torch.log_softmax(logits.to(statistics_dtype(logits)) / temperature, dim=-1)
    # A banned token, whose logit is −inf, has p·log p = 0, not 0·−inf.
    entropy = -torch.where(logp.isinf(), 0.0, logp.exp() * logp).sum(dim=-1)
    return logp.gather(-1, targets.unsqueeze(-1)).squeeze(-1), entropy


def policy_loss_ref(
    logp: torch.Tensor,
    advantages: torch.Tensor,
    token_weights: torch.Tensor,
    *,
    beta: float | torch.Tensor,
    old_logp: torch.Tensor | None = None,
    ref_logp: torch.Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    delta: float | None = None,
    surrogate: str = "clip",
    sapo_temperatures: tuple[float, float] = (1.0, 1.05),
    ratio_level: str = "token",
    cu_seqlens: torch.Tensor | None = None,
    is_weights: torch.Tensor | None = None,
    bias_corrected_kl: bool = False,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return w·(is·surrogate + β·k3) of each token, k3, clipped and kl_limited, from log-probs.

    All are (N,). With w = token_weights, is = is_weights, Â = advantages, ε = clip_low and
    clip_high, δ = delta:

    - ρ = exp(logp − old_logp); with `ratio_level` "sequence", the exponential of the mean of that
      difference over the tokens of a sequence that count, whose bounds are `cu_seqlens` (S+1,)
      (GSPO, arXiv 2507.18071)
    - k3 = exp(d) − d − 1 with d = ref_logp − logp, bounded by ±20 (OThink-MR1, arXiv 2503.16081);
      `bias_corrected_kl` multiplies it by ρ (DeepSeek-V3.2, arXiv 2512.02556)

    The surrogates:

    - clip: −min(min(ρ, δ)·Â, clip(ρ, 1−ε_low, 1+ε_high)·Â) (PPO; two-sided δ of INTELLECT-2, arXiv
      2505.07291)
    - cispo: −min(ρ, 1+ε_high)·Â·logp, with the ratio detached (MiniMax-M1, arXiv 2506.13585)
    - sapo: −(4/τ)·σ(τ(ρ−1))·Â, with τ from `sapo_temperatures`, the first for Â > 0 (SAPO, arXiv
      2511.20347)

    A token of weight 0 contributes exactly 0, also where its log-ratio is inf or NaN.
    """
    counts = token_weights != 0
    logp, advantages = torch.where(counts, logp, 0.0), torch.where(counts, advantages, 0.0)

    log_ratio = logp - (logp.detach() if old_logp is None else torch.where(counts, old_logp, 0.0))
    if ratio_level == "sequence":
        log_ratio = sequence_mean(log_ratio, counts, cu_seqlens)
    ratio = torch.exp(log_ratio)

    clipped = torch.zeros_like(counts)
    if surrogate == "clip":
        bounded = ratio if delta is None else ratio.clamp(max=delta)
        low, high = 1 - clip_low, 1 + clip_high
        policy = -torch.minimum(bounded * advantages, ratio.clamp(low, high) * advantages)
        clipped = ((ratio < low) & (advantages < 0)) | ((ratio > high) & (advantages > 0))
        if delta is not None:
            clipped |= (ratio > max(delta, high)) & (advantages < 0)
            clipped |= (ratio > delta) & (advantages > 0)
    elif surrogate == "cispo":
        policy = -ratio.detach().clamp(max=1 + clip_high) * advantages * logp
        clipped = (ratio > 1 + clip_high) & (advantages > 0)
    else:
        positive, negative = (torch.full_like(advantages, tau) for tau in sapo_temperatures)
        tau = torch.where(advantages > 0, positive, negative)
        policy = -(4 / tau) * torch.sigmoid(tau * (ratio - 1)) * advantages
    if is_weights is not None:
        policy = policy * torch.where(counts, is_weights, 0.0)

    if ref_logp is None:
        kl, kl_limited = torch.zeros_like(logp), torch.zeros_like(counts)
    else:
        d = torch.where(counts, ref_logp, 0.0) - logp
        kl_limited = d.abs() > KL_LOG_RATIO_LIMIT
        d = d.clamp(-KL_LOG_RATIO_LIMIT, KL_LOG_RATIO_LIMIT)
        kl = torch.expm1(d) - d  # exp(d) − d − 1 without its cancellation near 0
        if bias_corrected_kl:
            kl = kl * ratio

    per_token = torch.where(counts, token_weights * (policy + beta * kl), 0.0)
    return per_token, kl.detach(), clipped & counts, kl_limited


def objective_loss_ref(
    logp: torch.Tensor, objective: Objective, cu_seqlens: torch.Tensor | None = None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """`policy_loss_ref` of an objective; with `cu_seqlens` (S+1,) the ratio is per sequence."""
    return policy_loss_ref(
        logp,
        objective.advantages,
        objective.token_weights,
        beta=objective.beta,
        old_logp=objective.old_logp,
        ref_logp=objective.ref_logp,
        clip_low=objective.clip_low,
        clip_high=objective.clip_high,
        delta=objective.delta,
        surrogate=objective.surrogate,
        sapo_temperatures=(objective.tau_positive, objective.tau_negative),
        ratio_level="token" if cu_seqlens is None else "sequence",
        cu_seqlens=cu_seqlens,
        is_weights=objective.is_weights,
        bias_corrected_kl=objective.bias_corrected_kl,
    )


def grpo_loss_ref(
    logits: torch.Tensor,
    targets: torch.Tensor,
    advantages: torch.Tensor,
    token_weights: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    entropy_weights: torch.Tensor | None = None,
    **options,
) -> GRPOLoss:
    """Compute the loss of logits (N, V), differentiable, with the options of `policy_loss_ref`.

    With `entropy_weights` (N,), Σ entropy_weights · entropy is subtracted.
    """
    logp, entropy = token_logprobs_ref(logits, targets, temperature)
    per_token, kl, clipped, kl_limited = policy_loss_ref(logp, advantages, token_weights, **options)
    loss = per_token.sum()
    if entropy_weights is not None:
        loss = loss - entropy_sum_ref(entropy, entropy_weights)
    return GRPOLoss(loss, logp.detach(), entropy.detach(), kl, clipped, kl_limited)


def entropy_sum_ref(entropy: torch.Tensor, entropy_weights: torch.Tensor) -> torch.Tensor:
    """Return Σ entropy_weights · entropy of (N,) tokens; a weight of 0 takes out inf and NaN."""
    return torch.where(entropy_weights != 0, entropy_weights * entropy, 0.0).sum()


def spread(
    per_sequence: torch.Tensor, cu_seqlens: torch.Tensor, num_tokens: int | None = None
) -> torch.Tensor:
    """Repeat a value per sequence (S,) for each of its tokens, (N,).

    `cu_seqlens` (S+1,): the tokens of sequence i are cu_seqlens[i] … cu_seqlens[i+1]. With N =
    `num_tokens` given, a GPU need not synchronise.
    """
    return per_sequence.repeat_interleave(cu_seqlens.diff().long(), output_size=num_tokens)


def sequence_mean(
    values: torch.Tensor, counts: torch.Tensor, cu_seqlens: torch.Tensor
) -> torch.Tensor:
    """Return the mean of `values` (N,) over the tokens of a sequence that count, for each token."""
    sequences = torch.arange(len(cu_seqlens) - 1, device=values.device)
    ids = spread(sequences, cu_seqlens, len(values))
    sums = values.new_zeros(len(sequences)).index_add(0, ids, torch.where(counts, values, 0.0))
    sizes = values.new_zeros(len(sequences)).index_add(0, ids, counts.to(values.dtype))
    return (sums / sizes.clamp(min=1)).index_select(0, ids)
