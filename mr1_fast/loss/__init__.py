"""The public loss functions.

Each comes on logits, for trainers that have them, and on hidden states, where logits of a whole
batch never exist. A function gathers its arguments in one `Objective`, has `arguments.py` check it,
and hands it to the operators of `mr1_fast.kernels.grpo`.
"""

from torch import Tensor

from ..kernels.grpo.linear import linear_grpo_loss_with_gradient
from ..kernels.grpo.linear import linear_token_logprobs as linear_token_logprobs_op
from ..kernels.grpo.objective import GRPOLoss, Objective
from ..kernels.grpo.operators import grpo_loss_with_gradient
from ..kernels.grpo.operators import token_logprobs as token_logprobs_op
from ..kernels.grpo.reference import (
    entropy_sum_ref,
    grpo_loss_ref,
    objective_loss_ref,
    policy_loss_ref,
    spread,
    token_logprobs_ref,
)
from .arguments import (
    check_linear,
    check_logits,
    check_objective,
    check_weight_grad,
    check_weighted_logits,
    chunk_budget,
    per_token,
    scalar,
)
from .weights import LOSS_TYPES, token_weights

__all__ = [
    "LOSS_TYPES",
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


def token_logprobs(
    logits: Tensor,
    targets: Tensor,
    temperature: float | Tensor = 1.0,
    token_weights: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Return each target's log-probability and each row's entropy in nats, fp32 (N,).

    Both are differentiable. `logits` (N, V) in fp32, bf16 or fp16 are divided by `temperature`
    here; rows may be strided. `targets` (N,) are int64 in [0, V); on a GPU, where checking would
    synchronise, a target outside gives NaN.

    `token_weights` (N,) is a mask or weights of any dtype; None: every row counts. A row of weight
    0 is not read: its log-probability, its entropy and its gradient are exactly 0, whatever its
    logits and its target hold. Results are not multiplied by other weights. Raises ValueError.
    """
    logits, token_weights = check_weighted_logits(logits, targets, token_weights)
    temperature = scalar("temperature", temperature, logits)
    logp, entropy, _, _ = token_logprobs_op(logits, targets, temperature, token_weights)
    return logp, entropy


def linear_token_logprobs(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    temperature: float | Tensor = 1.0,
    bias: Tensor | None = None,
    *,
    chunk_bytes: int | None = None,
    wide_logits: bool = False,
) -> tuple[Tensor, Tensor]:
    """Compute `token_logprobs` of the logits hidden (N, D) @ weight (V, D)ᵀ + bias (V,).

    Logits exist for a chunk of rows at a time; the backward makes them again. `chunk_bytes` bounds
    a chunk's bytes (default 832 MiB on a GPU, which takes what keeps it busy, and 80 MiB on a CPU).
    Without gradients this is the cheap way to log-probabilities of the reference model and of the
    policy at sampling. Raises ValueError.

    `wide_logits` keeps the logits of 16-bit hidden states in fp32, half as many rows at a time. The
    loss rounds its logits to 16 bits, so what it is compared with, at sampling or of a reference,
    must be rounded too: else equal weights have a ratio beside 1.
    """
    hidden, weight, bias = check_linear(hidden, weight, bias, targets)
    temperature = scalar("temperature", temperature, hidden)
    budget = chunk_budget(chunk_bytes, hidden)
    logp, entropy, _, _ = linear_token_logprobs_op(
        hidden, weight, bias, targets, temperature, budget, wide_logits
    )
    return logp, entropy


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
    entropy_weights: Tensor | None = None,
    inplace: bool = False,
) -> GRPOLoss:
    """Compute Σ token_weights · (is_weights · surrogate + β·k3), its gradient, and what to log.

    One pass over the logits yields all of it. The formulas stand at `policy_loss_ref`, which this
    equals. With `entropy_weights`, Σ entropy_weights · entropy is subtracted.

    - logits: (N, V) in fp32, bf16 or fp16, before temperature; targets: (N,) int64
    - advantages, is_weights: per token (N,), or per sequence (S,) with `cu_seqlens` (S+1,), the
      bounds of the sequences among the rows; where S = N, they are taken per token
    - token_weights: (N,), which holds mask, 1/|o_i|, 1/G and gradient accumulation at once; see the
      function `token_weights`. A token of weight 0 contributes exactly 0. In fp16, multiply the
      loss scale into them, since gradients are made before `backward`
    - beta, temperature: a float or a 0-d tensor; a new value costs nothing. β = 0 needs no
      `ref_logp`
    - old_logp: (N,) log-probabilities at sampling; None: on-policy, where ρ = 1 still has its
      gradient
    - ref_logp: (N,) log-probabilities of the reference model
    - surrogate: clip; cispo, which caps ρ at 1 + clip_high; or sapo, whose τ are
      `sapo_temperatures`, for positive and for other advantages
    - clip_low, clip_high, delta: the bounds of ρ
    - ratio_level: token; or sequence, for GSPO, which costs a second read of the logits, as ρ needs
      all of them
    - bias_corrected_kl: multiply k3 by ρ
    - entropy_weights: (N,), for example c/N for c times the mean entropy of the tokens; costs a
      second read of the logits. A token counts here by this weight alone
    - inplace: the gradient overwrites the logits, so that no second tensor of their size exists;
      ignored where ρ is taken per sequence, and with entropy_weights

    A row of NaN logits shows in `loss` and `logp`; its gradient is 0. Backward runs once per call.
    Raises ValueError.
    """
    logits = check_logits(logits, targets, inplace)
    objective = Objective(
        advantages, token_weights, beta, temperature, old_logp, ref_logp, is_weights,
        surrogate, clip_low, clip_high, delta, *sapo_temperatures, bias_corrected_kl,
    )  # fmt: skip
    objective = check_objective(objective, logits, ratio_level, cu_seqlens)
    entropy_weights = per_token("entropy_weights", entropy_weights, logits)
    targets = targets.contiguous()
    if ratio_level == "sequence" or entropy_weights is not None:
        logp, entropy, _, _ = token_logprobs_op(logits, targets, objective.temperature)
        sequences = cu_seqlens if ratio_level == "sequence" else None
        return _by_autograd(logp, entropy, objective, sequences, entropy_weights)
    return grpo_loss_with_gradient(logits, targets, objective, inplace)


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
    entropy_weights: Tensor | None = None,
    bias: Tensor | None = None,
    chunk_bytes: int | None = None,
    fp32_accumulation: bool | None = None,
    weight_grad: Tensor | None = None,
) -> GRPOLoss:
    """Compute `grpo_loss` of the logits hidden (N, D) @ weight (V, D)ᵀ + bias (V,).

    Loss and all gradients take three GEMMs; a frozen weight costs no gradient and no third GEMM;
    ratios per sequence or `entropy_weights` cost one more. Under autocast the products run in its
    dtype. A tensor of all logits never exists. Backward runs once per call. Raises ValueError.

    - chunk_bytes: bound on the bytes of logits that exist at a time (default 832 MiB on a GPU,
      80 MiB on a CPU); a GPU takes as many rows as keep it busy
    - fp32_accumulation: whether the gradient of a 16-bit weight is summed over the chunks in fp32,
      which takes a second tensor of twice its size. None: over more than 8 chunks. The relative
      error of a bf16 gradient is 1.7e-3 with it, and without it 2.4e-3 over 3 chunks, 3.5e-3 over
      8, and 6.7e-3 over 64
    - weight_grad: (V, D) tensor in the dtype of the products or in fp32, such as `weight.grad`, to
      which the weight's gradient is added in the forward, so that it needs no memory of its own.
      The weight then gets no gradient from backward, so DDP or FSDP would wait in vain for one.
      Backward must start at the loss itself: at another incoming gradient than 1 it raises
      RuntimeError on a CPU, and turns `weight_grad` to NaN on a GPU. Under no_grad nothing is added
    """
    hidden, weight, bias = check_linear(hidden, weight, bias, targets)
    in_one_pass = ratio_level != "sequence" and entropy_weights is None
    check_weight_grad(weight_grad, weight, in_one_pass)
    objective = Objective(
        advantages, token_weights, beta, temperature, old_logp, ref_logp, is_weights,
        surrogate, clip_low, clip_high, delta, *sapo_temperatures, bias_corrected_kl,
    )  # fmt: skip
    objective = check_objective(objective, hidden, ratio_level, cu_seqlens)
    entropy_weights = per_token("entropy_weights", entropy_weights, hidden)
    targets = targets.contiguous()
    budget = chunk_budget(chunk_bytes, hidden)
    if not in_one_pass:
        logp, entropy, _, _ = linear_token_logprobs_op(
            hidden, weight, bias, targets, objective.temperature, budget
        )
        sequences = cu_seqlens if ratio_level == "sequence" else None
        return _by_autograd(logp, entropy, objective, sequences, entropy_weights)
    return linear_grpo_loss_with_gradient(
        hidden, weight, bias, targets, objective, budget, fp32_accumulation, weight_grad
    )


def _by_autograd(
    logp: Tensor,
    entropy: Tensor,
    objective: Objective,
    cu_seqlens: Tensor | None,
    entropy_weights: Tensor | None,
) -> GRPOLoss:
    """Compute a loss whose derivative by a row's logits needs more than the row's own passes.

    It is one with a ratio per sequence, whose bounds are `cu_seqlens` (S+1,), or with an entropy.
    `logp` and `entropy` (N,) are differentiable: the reference's equations and autograd do the
    rest.
    """
    losses, *per_row = objective_loss_ref(logp, objective, cu_seqlens)
    loss = losses.sum()
    if entropy_weights is not None:
        loss = loss - entropy_sum_ref(entropy, entropy_weights)
    return GRPOLoss(loss, logp.detach(), entropy.detach(), *per_row)
