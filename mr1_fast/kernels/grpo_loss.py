"""GRPO on logits: the equations, and the row operations that every operator is built from.

Fused: temperature, log-softmax, entropy, k3, the surrogate, and the gradient of all of it by the logits. With a
token's logits x (V,), temperature T and z = x/T, everything follows from one read of the row:

    logp = z[target] − log Σ exp z    entropy = −Σ p·log p    dloss/dx = (dloss/dlogp)·(onehot − p)/T

so the loss of a token gives one number, dloss/dlogp, and the gradient takes the place of the logits.
Never stored: probabilities, log-probabilities over V, a mask over V. Bytes: one read and one write of the logits.

dtype contract: logits in fp32, bf16 or fp16 (fp64 through PyTorch); statistics, log-probs, KL and loss in fp32. Near
the start of training the KL is 1e-3…1e-4, below what bf16 can resolve.

Here: the references, and the row operations on PyTorch. The same operations in Triton: grpo_loss_triton.py; on a CPU by
csrc/: grpo_loss_native.py.
"""

import os
from collections.abc import Iterator
from importlib.util import find_spec
from types import ModuleType
from typing import NamedTuple

import torch

KL_LOG_RATIO_LIMIT = 20.0
"""Bound on |log π_ref − log π_θ| inside k3, whose exponential would overflow; exp(20) is already 5e8."""
_HAS_TRITON = find_spec("triton") is not None  # it exists for Linux alone
BANNED = -1e30
"""Stands for the log-probability −inf where it is multiplied by its probability, 0."""
SURROGATES = ("clip", "cispo", "sapo")
BLOCK_ELEMENTS = 2**20
"""Logits that the PyTorch path works on at a time, so that its temporaries stay in the cache and small."""


class GRPOLoss(NamedTuple):
    """What one pass over the tokens yields; all but `loss` are detached."""

    loss: torch.Tensor
    """() Σ token_weights · (surrogate + β·k3)."""
    logp: torch.Tensor
    """(N,) log-probability of each target, at the temperature."""
    entropy: torch.Tensor
    """(N,) entropy of each row's distribution, in nats."""
    kl: torch.Tensor
    """(N,) k3 of each token (times the ratio, with bias_corrected_kl); 0 without ref_logp."""
    clipped: torch.Tensor
    """(N,) bool: the clip took the gradient of the surrogate away (cispo: the cap acted on a positive advantage)."""
    kl_limited: torch.Tensor
    """(N,) bool: the log-ratio inside k3 hit its bound."""


class Objective(NamedTuple):
    """What the loss of a token depends on beside its logits. Tensors are fp32; (N,) unless said."""

    advantages: torch.Tensor
    token_weights: torch.Tensor
    beta: torch.Tensor  # ()
    temperature: torch.Tensor  # ()
    old_logp: torch.Tensor | None
    ref_logp: torch.Tensor | None
    is_weights: torch.Tensor | None
    surrogate: str
    bounds: list[float]  # clip_low, clip_high, delta, τ of sapo for positive and for other advantages
    bias_corrected_kl: bool

    def rows(self, rows: slice) -> "Objective":
        """The objective of some of the rows."""
        per_row = ("advantages", "token_weights", "old_logp", "ref_logp", "is_weights")
        return self._replace(**{name: getattr(self, name)[rows] for name in per_row if getattr(self, name) is not None})


class RowResults(NamedTuple):
    """Per-row outputs of the fused loss, (N,) each; `loss` is weighted."""

    loss: torch.Tensor
    logp: torch.Tensor
    entropy: torch.Tensor
    kl: torch.Tensor
    clipped: torch.Tensor
    kl_limited: torch.Tensor

    @classmethod
    def empty(cls, logits: torch.Tensor) -> "RowResults":
        """Room for the results of logits (N, V); fake ones for fake logits."""
        n, dtype = logits.shape[0], statistics_dtype(logits)
        return cls(
            *(logits.new_empty(n, dtype=dtype) for _ in range(4)),
            *(logits.new_empty(n, dtype=torch.bool) for _ in range(2)),
        )

    def rows(self, rows: slice) -> "RowResults":
        """Views of some of the rows."""
        return RowResults(*(value[rows] for value in self))


# --- references ---------------------------------------------------------------------------------------------------


def token_logprobs_ref(
    logits: torch.Tensor, targets: torch.Tensor, temperature: float | torch.Tensor = 1.0
) -> tuple[torch.Tensor, torch.Tensor]:
    """Log-probability of each target and entropy of each row, both (N,), from logits (N, V) / temperature."""
    logp = torch.log_softmax(logits.to(statistics_dtype(logits)) / temperature, dim=-1)
    # A banned token (−inf) has p·log p = 0, not 0·−inf.
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
    """Per-token loss w·(is·surrogate + β·k3), k3, clipped and kl_limited, all (N,), from log-probabilities (N,).

    ρ = exp(logp − old_logp), or the exponential of its mean over each sequence (GSPO, arXiv 2507.18071); Â the
    advantage; k3 = exp(d) − d − 1 with d = ref_logp − logp (OThink-MR1, arXiv 2503.16081). Surrogates:

    - clip: −min(min(ρ, δ)·Â, clip(ρ, 1−ε_low, 1+ε_high)·Â) (PPO; two-sided δ of INTELLECT-2, arXiv 2505.07291)
    - cispo: −min(ρ, 1+ε_high)·Â·logp, the ratio detached (MiniMax-M1, arXiv 2506.13585)
    - sapo: −(4/τ)·σ(τ(ρ−1))·Â, τ by the sign of Â (SAPO, arXiv 2511.20347)

    `bias_corrected_kl` multiplies k3 by ρ (DeepSeek-V3.2, arXiv 2512.02556). A token of weight 0 contributes exactly
    0, also where its log-ratio is inf or NaN.
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
            clipped |= (ratio > max(delta, high)) & (advantages < 0) | (ratio > delta) & (advantages > 0)
    elif surrogate == "cispo":
        policy = -ratio.detach().clamp(max=1 + clip_high) * advantages * logp
        clipped = (ratio > 1 + clip_high) & (advantages > 0)
    else:
        tau = torch.where(advantages > 0, *(torch.full_like(advantages, each) for each in sapo_temperatures))
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


def grpo_loss_ref(
    logits: torch.Tensor,
    targets: torch.Tensor,
    advantages: torch.Tensor,
    token_weights: torch.Tensor,
    *,
    temperature: float | torch.Tensor = 1.0,
    **objective,
) -> GRPOLoss:
    """The whole loss from logits (N, V), by autograd; `objective` as for `policy_loss_ref`."""
    logp, entropy = token_logprobs_ref(logits, targets, temperature)
    per_token, kl, clipped, kl_limited = policy_loss_ref(logp, advantages, token_weights, **objective)
    return GRPOLoss(per_token.sum(), logp.detach(), entropy.detach(), kl, clipped, kl_limited)


def spread(per_sequence: torch.Tensor, cu_seqlens: torch.Tensor, num_tokens: int | None = None) -> torch.Tensor:
    """(N,) per-token copy of a per-sequence tensor (S,); with N = `num_tokens` given, a GPU need not synchronise."""
    return per_sequence.repeat_interleave(cu_seqlens.diff().long(), output_size=num_tokens)


def sequence_mean(values: torch.Tensor, counts: torch.Tensor, cu_seqlens: torch.Tensor) -> torch.Tensor:
    """(N,) mean of `values` over the tokens of their sequence that count, repeated for each token."""
    sequences = torch.arange(len(cu_seqlens) - 1, device=values.device)
    ids = spread(sequences, cu_seqlens, len(values))
    sums = values.new_zeros(len(sequences)).index_add(0, ids, torch.where(counts, values, 0.0))
    sizes = values.new_zeros(len(sequences)).index_add(0, ids, counts.to(values.dtype))
    return (sums / sizes.clamp(min=1)).index_select(0, ids)


# --- row operations -----------------------------------------------------------------------------------------------


def statistics_dtype(logits: torch.Tensor) -> torch.dtype:
    """fp32, or fp64 for fp64 logits."""
    return torch.promote_types(logits.dtype, torch.float32)


def use_triton(logits: torch.Tensor) -> bool:
    """Whether the Triton kernels take these logits: on a GPU, or anywhere under Triton's interpreter."""
    interpreted = os.environ.get("TRITON_INTERPRET") == "1"
    return (
        (logits.is_cuda or interpreted)
        and _HAS_TRITON
        and logits.dtype in (torch.float32, torch.bfloat16, torch.float16)
    )


def backend(logits: torch.Tensor) -> ModuleType | None:
    """The module whose row operations take these logits; None: the PyTorch ones below."""
    if use_triton(logits):
        from . import grpo_loss_triton

        return grpo_loss_triton
    if logits.device.type == "cpu":
        from . import grpo_loss_native

        return grpo_loss_native if grpo_loss_native.takes(logits) else None
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
        for output, value in zip(outputs, _statistics(logits[rows], targets[rows], temperature)[:4], strict=True):
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
        module.row_logprobs_backward(logits, targets, temperature, entropy, peak, log_sum, grad_logp, grad_entropy, out)
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
    logits: torch.Tensor, targets: torch.Tensor, objective: Objective, results: RowResults, out: torch.Tensor | None
) -> None:
    """Fill `results`, and write the gradient of Σ loss by the logits into `out` (N, V), unless that is None.

    `out` may be the logits themselves. A row whose derivative is 0 or not finite (NaN logits, an infinite ratio) gets
    a gradient of exactly 0: the loss reports it, the weights do not suffer from it.
    """
    targets = targets.contiguous()
    if module := backend(logits):
        if logits.is_cuda:
            from . import grpo_loss_cuda

            module = grpo_loss_cuda if grpo_loss_cuda.takes(logits) else module
        module.row_grpo(logits, targets, objective, results, out)
        return
    for rows in _blocks(logits):
        _row_grpo_block(logits[rows], targets[rows], objective.rows(rows), results.rows(rows), out, rows)


def scale_(gradient: torch.Tensor, factor: torch.Tensor) -> None:
    """Multiply in place by a 0-d tensor; where that is 1, the gradient is not touched (and nothing is synchronised)."""
    if use_triton(gradient) and gradient.is_contiguous():
        from . import grpo_loss_triton

        grpo_loss_triton.scale_(gradient, factor)
    elif gradient.is_cuda or factor.item() != 1:
        gradient.mul_(factor)


def _blocks(logits: torch.Tensor) -> Iterator[slice]:
    size = max(1, BLOCK_ELEMENTS // logits.shape[1])
    return (slice(start, min(start + size, len(logits))) for start in range(0, len(logits), size))


def _statistics(logits: torch.Tensor, targets: torch.Tensor, temperature: torch.Tensor) -> tuple[torch.Tensor, ...]:
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


def _row_grpo_block(logits, targets, objective: Objective, results: RowResults, out, rows: slice) -> None:
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
    for result, value in zip(results, (per_token, logp, entropy, kl, clipped, kl_limited), strict=True):
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
        tau = torch.where(advantages > 0, *(torch.full_like(advantages, each) for each in sapo_temperatures))
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
