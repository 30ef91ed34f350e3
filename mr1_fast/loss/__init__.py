"""The public loss functions, and token weights for every way to average.

Each comes on logits, for trainers that have them, and on hidden states, where logits of a whole batch never exist.
Arguments are checked in loss_arguments.py, then handed to the operators in kernels/.
"""

import torch
from torch import Tensor

from ..kernels.grpo.linear import linear_grpo_loss_with_gradient
from ..kernels.grpo.linear import linear_token_logprobs as linear_token_logprobs_op
from ..kernels.grpo.objective import GRPOLoss
from ..kernels.grpo.operators import grpo_loss_with_gradient
from ..kernels.grpo.operators import token_logprobs as token_logprobs_op
from ..kernels.grpo.reference import grpo_loss_ref, policy_loss_ref, spread, token_logprobs_ref
from .arguments import arguments_after_logits, check_linear, check_logits, chunk_budget, scalar

__all__ = [
    "GRPOLoss",
    "grpo_loss",
    "grpo_loss_ref",
    "linear_grpo_loss",
    "linear_token_logprobs",
    "policy_loss_ref",
    "spread",
    "token_logprobs",
    "token_logprobs_ref",
    "token_weights",
]

LOSS_TYPES = ("grpo", "dr_grpo", "bnpo", "dapo", "luspo")


def token_logprobs(
    logits: Tensor, targets: Tensor, temperature: float | Tensor = 1.0
) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of each row: fp32 (N,), differentiable through both.

    `logits` (N, V) in fp32, bf16 or fp16, divided by `temperature` here; rows may be strided. `targets` (N,) int64 in
    [0, V): on a GPU, where checking would synchronise, a target outside gives NaN. Raises ValueError.
    """
    logits = check_logits(logits, targets)
    return token_logprobs_op(logits, targets, scalar("temperature", temperature, logits))[:2]


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    *,
    chunk_bytes: int | None = None,
) -> tuple[Tensor, Tensor]:
    """`token_logprobs` of the logits hidden (N, D) @ weight (V, D)ᵀ + bias (V,), without their tensor.

    Logits exist for as many rows at a time as `chunk_bytes` hold (default 512 MB on a GPU, 48 MB on a CPU); the
    backward makes them again. Without gradients this is the cheap form for reference and old log-probs.
    """
    hidden, weight, bias = check_linear(hidden, weight, bias, targets)
    temperature = scalar("temperature", temperature, hidden)
    return linear_token_logprobs_op(
        hidden, weight, bias, targets, temperature, chunk_budget(chunk_bytes, hidden)
    )[:2]


def grpo_loss(
    logits: Tensor,
    targets: Tensor,
    advantages: Tensor,
    token_weights: Tensor,
    *,
    beta: float | Tensor,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    delta: float | None = None,
    temperature: float | Tensor = 1.0,
    surrogate: str = "clip",
    sapo_temperatures: tuple[float, float] = (1.0, 1.05),
    ratio_level: str = "token",
    cu_seqlens: Tensor | None = None,
    is_weights: Tensor | None = None,
    bias_corrected_kl: bool = False,
    inplace: bool = False,
) -> GRPOLoss:
    """Σ token_weights · (is_weights · surrogate + β·k3), its gradient, and what to log, in one pass over the logits.

    The formulas stand at `policy_loss_ref`, which this equals.

    - logits (N, V) fp32, bf16 or fp16, before temperature; targets (N,) int64
    - advantages, is_weights: per token (N,), or per sequence (S,) with `cu_seqlens` (S+1,); of length S = N: per token
    - token_weights (N,): mask, 1/|o_i|, 1/G and gradient accumulation at once, see `token_weights`. A token of
      weight 0 contributes exactly 0. In fp16, put the loss scale in here: gradients are made before `backward`.
    - beta, temperature: a float or a 0-d tensor; a new value costs nothing. β = 0 needs no `ref_logp`
    - old_logp (N,), None: on-policy, ρ = 1 with its gradient; ref_logp (N,)
    - clip_low, clip_high, delta: bounds of ρ; `surrogate` is clip, cispo (ρ capped at 1 + clip_high) or sapo
    - ratio_level "sequence": GSPO; costs a second read of the logits, as ρ needs all of them
    - inplace: the gradient overwrites the logits, so that no second tensor of their size exists; ignored where
      ρ is taken per sequence

    A row of NaN logits shows in `loss` and `logp`; its gradient is 0. Backward runs once per call. Raises ValueError.
    """
    logits = check_logits(logits, targets, inplace)
    arguments = arguments_after_logits(
        logits, targets, advantages, token_weights, beta, temperature, old_logp, ref_logp, clip_low, clip_high, delta,
        surrogate, sapo_temperatures, ratio_level, cu_seqlens, is_weights, bias_corrected_kl,
    )  # fmt: skip
    if ratio_level == "sequence":
        logp, entropy = token_logprobs_op(logits, targets, arguments[4])[:2]
        return _sequence_level(logp, entropy, arguments, cu_seqlens)
    return grpo_loss_with_gradient(logits, arguments, inplace)


def linear_grpo_loss(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    advantages: Tensor,
    token_weights: Tensor,
    *,
    beta: float | Tensor,
    old_logp: Tensor | None = None,
    ref_logp: Tensor | None = None,
    clip_low: float = 0.2,
    clip_high: float = 0.2,
    delta: float | None = None,
    temperature: float | Tensor = 1.0,
    surrogate: str = "clip",
    sapo_temperatures: tuple[float, float] = (1.0, 1.05),
    ratio_level: str = "token",
    cu_seqlens: Tensor | None = None,
    is_weights: Tensor | None = None,
    bias_corrected_kl: bool = False,
    bias: Tensor | None = None,
    chunk_bytes: int | None = None,
) -> GRPOLoss:
    """`grpo_loss` of the logits hidden (N, D) @ weight (V, D)ᵀ + bias (V,), without their tensor.

    Three GEMMs for loss and all gradients; a frozen weight costs no gradient and no third GEMM. Ratios per sequence
    cost a fourth. Under autocast the products run in its dtype. `chunk_bytes` bounds the logits that exist
    at a time (default 512 MB on a GPU, 48 MB on a CPU). Backward runs once per call.
    """
    hidden, weight, bias = check_linear(hidden, weight, bias, targets)
    arguments = arguments_after_logits(
        hidden, targets, advantages, token_weights, beta, temperature, old_logp, ref_logp, clip_low, clip_high, delta,
        surrogate, sapo_temperatures, ratio_level, cu_seqlens, is_weights, bias_corrected_kl,
    )  # fmt: skip
    budget = chunk_budget(chunk_bytes, hidden)
    if ratio_level == "sequence":
        logp, entropy = linear_token_logprobs_op(
            hidden, weight, bias, targets, arguments[4], budget
        )[:2]
        return _sequence_level(logp, entropy, arguments, cu_seqlens)
    return linear_grpo_loss_with_gradient(hidden, weight, bias, arguments, budget)


def token_weights(
    cu_seqlens: Tensor,
    loss_type: str = "grpo",
    *,
    num_sequences: float | None = None,
    num_tokens: float | Tensor | None = None,
    max_completion_length: int | None = None,
    mask: Tensor | None = None,
    accumulation_steps: int = 1,
) -> Tensor:
    """(N,) fp32 weights that make Σ weight·loss the average which `loss_type` names, with |o_i| = length of sequence i:

    - grpo: 1/(S·|o_i|), the mean over sequences of the mean over tokens (DeepSeekMath, arXiv 2402.03300)
    - dr_grpo: 1/(S·max_completion_length) (arXiv 2503.20783)
    - bnpo: 1/num_tokens of this batch; dapo: 1/num_tokens of the whole optimizer step (arXiv 2503.14476)
    - luspo: 1/S, the mean over sequences of the sum over tokens

    `cu_seqlens` (S+1,): rows cu_seqlens[i] … cu_seqlens[i+1] are sequence i, which may be empty. `mask` (N,): tokens
    that count (None: all). Losses of micro-batches add up when `num_sequences` (default: this batch's S) or
    `num_tokens` count the whole optimizer step; else divide by `accumulation_steps`. DDP and FSDP average gradients
    over processes: there these counts are those of all processes divided by the number of processes.
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type is {loss_type!r}: choose one of {', '.join(LOSS_TYPES)}")
    lengths = cu_seqlens.diff()
    readable = (
        cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling()
    )  # elsewhere it would synchronise
    if mask is not None and (mask.ndim != 1 or (readable and len(mask) != cu_seqlens[-1])):
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}: expected (N,), a value for each of cu_seqlens[-1] tokens"
        )
    if mask is None:
        mask = torch.ones(int(cu_seqlens[-1]), dtype=torch.bool, device=cu_seqlens.device)
    sizes = lengths.float()
    if len(lengths):  # on a GPU, checking the lengths would synchronise
        sizes = torch.segment_reduce(
            mask.float(), "sum", lengths=lengths.long(), unsafe=mask.is_cuda
        )
    sequences = (len(lengths) if num_sequences is None else num_sequences) * accumulation_steps
    if loss_type == "grpo":
        per_sequence = 1 / (sequences * sizes.clamp(min=1))
    elif loss_type == "luspo":
        per_sequence = torch.full_like(sizes, 1 / max(1, sequences))
    elif loss_type == "dr_grpo":
        if not max_completion_length:
            raise ValueError(
                "dr_grpo divides by max_completion_length: pass the limit of the rollout"
            )
        per_sequence = torch.full_like(sizes, 1 / max(1, sequences * max_completion_length))
    else:
        if loss_type == "dapo" and (num_tokens is None or accumulation_steps != 1):
            raise ValueError(
                "dapo divides by num_tokens, the tokens of the whole optimizer step: pass that alone"
            )
        total = sizes.sum() if num_tokens is None else scalar("num_tokens", num_tokens, sizes)
        per_sequence = (1 / (total.clamp(min=1) * accumulation_steps)).expand(len(sizes))
    return torch.where(mask != 0, spread(per_sequence, cu_seqlens, len(mask)), 0.0)


def _sequence_level(
    logp: Tensor, entropy: Tensor, arguments: tuple, cu_seqlens: Tensor
) -> GRPOLoss:
    """The loss where a token's ratio depends on its whole sequence: differentiable log-probs, then the reference."""
    (
        _,
        advantages,
        weights,
        beta,
        _,
        old_logp,
        ref_logp,
        is_weights,
        surrogate,
        bounds,
        bias_corrected_kl,
    ) = arguments
    clip_low, clip_high, delta, *sapo_temperatures = bounds
    per_token, kl, clipped, kl_limited = policy_loss_ref(
        logp, advantages, weights, beta=beta, old_logp=old_logp, ref_logp=ref_logp, clip_low=clip_low,
        clip_high=clip_high, delta=delta, surrogate=surrogate, sapo_temperatures=tuple(sapo_temperatures),
        ratio_level="sequence", cu_seqlens=cu_seqlens, is_weights=is_weights, bias_corrected_kl=bias_corrected_kl,
    )  # fmt: skip
    return GRPOLoss(per_token.sum(), logp.detach(), entropy.detach(), kl, clipped, kl_limited)
