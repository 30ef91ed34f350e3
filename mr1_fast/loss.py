"""The public loss functions: what they accept, and token weights for every way to average.

Each comes on logits, for trainers that have them, and on hidden states, where logits of a whole batch never exist.
Arguments are checked here, then handed to the operators in kernels/.
"""

import torch
from torch import Tensor

from .kernels.grpo_loss import (
    SURROGATES,
    GRPOLoss,
    grpo_loss_ref,
    policy_loss_ref,
    statistics_dtype,
    token_logprobs_ref,
)
from .kernels.linear_grpo_loss import CHUNK_BYTES, linear_grpo_loss_with_gradient
from .kernels.linear_grpo_loss import linear_token_logprobs as linear_token_logprobs_op
from .kernels.operators import grpo_loss_with_gradient
from .kernels.operators import token_logprobs as token_logprobs_op

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
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def token_logprobs(logits: Tensor, targets: Tensor, temperature: float | Tensor = 1.0) -> tuple[Tensor, Tensor]:
    """Log-probability of each target and entropy of each row: fp32 (N,), differentiable through both.

    `logits` (N, V) in fp32, bf16 or fp16, divided by `temperature` here; rows may be strided. `targets` (N,) int64 in
    [0, V): on a GPU, where checking would synchronise, a target outside gives NaN. Raises ValueError.
    """
    logits = _check_logits(logits, targets)
    return token_logprobs_op(logits, targets, _scalar("temperature", temperature, logits))[:2]


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
    hidden, weight, bias = _check_linear(hidden, weight, bias, targets)
    temperature = _scalar("temperature", temperature, hidden)
    return linear_token_logprobs_op(hidden, weight, bias, targets, temperature, _budget(chunk_bytes, hidden))[:2]


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
    - ratio_level "sequence": GSPO; costs a second read of the logits when `old_logp` is given, as ρ needs all of them
    - inplace: the gradient overwrites the logits, so that no second tensor of their size exists; ignored where
      ρ is taken per sequence

    A row of NaN logits shows in `loss` and `logp`; its gradient is 0. Backward runs once per call. Raises ValueError.
    """
    logits = _check_logits(logits, targets, inplace)
    arguments = _arguments(
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

    Three GEMMs for loss and all gradients; a frozen weight costs no gradient and no third GEMM. Off-policy ratios per
    sequence cost a fourth. Under autocast the products run in its dtype. `chunk_bytes` bounds the logits that exist
    at a time (default 512 MB on a GPU, 48 MB on a CPU). Backward runs once per call.
    """
    hidden, weight, bias = _check_linear(hidden, weight, bias, targets)
    arguments = _arguments(
        hidden, targets, advantages, token_weights, beta, temperature, old_logp, ref_logp, clip_low, clip_high, delta,
        surrogate, sapo_temperatures, ratio_level, cu_seqlens, is_weights, bias_corrected_kl,
    )  # fmt: skip
    budget = _budget(chunk_bytes, hidden)
    if ratio_level == "sequence":
        logp, entropy = linear_token_logprobs_op(hidden, weight, bias, targets, arguments[4], budget)[:2]
        return _sequence_level(logp, entropy, arguments, cu_seqlens)
    return linear_grpo_loss_with_gradient(hidden, weight, bias, arguments, budget)


def token_weights(
    cu_seqlens: Tensor,
    loss_type: str = "grpo",
    *,
    num_sequences: int | None = None,
    num_tokens: int | Tensor | None = None,
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
    `num_tokens` count the whole optimizer step; else divide by `accumulation_steps`.
    """
    if loss_type not in LOSS_TYPES:
        raise ValueError(f"loss_type is {loss_type!r}: choose one of {', '.join(LOSS_TYPES)}")
    lengths = cu_seqlens.diff()
    if mask is not None and (mask.ndim != 1 or (mask.device.type == "cpu" and len(mask) != cu_seqlens[-1])):
        raise ValueError(
            f"mask has shape {tuple(mask.shape)}: expected (N,), a value for each of cu_seqlens[-1] tokens"
        )
    if mask is None:
        mask = torch.ones(int(cu_seqlens[-1]), dtype=torch.bool, device=cu_seqlens.device)
    sizes = torch.segment_reduce(mask.float(), "sum", lengths=lengths.long()) if len(lengths) else lengths.float()
    sequences = (len(lengths) if num_sequences is None else num_sequences) * accumulation_steps
    if loss_type == "grpo":
        per_sequence = 1 / (sequences * sizes.clamp(min=1))
    elif loss_type == "luspo":
        per_sequence = torch.full_like(sizes, 1 / max(1, sequences))
    elif loss_type == "dr_grpo":
        if not max_completion_length:
            raise ValueError("dr_grpo divides by max_completion_length: pass the limit of the rollout")
        per_sequence = torch.full_like(sizes, 1 / max(1, sequences * max_completion_length))
    else:
        if loss_type == "dapo" and (num_tokens is None or accumulation_steps != 1):
            raise ValueError("dapo divides by num_tokens, the tokens of the whole optimizer step: pass that alone")
        total = torch.as_tensor(sizes.sum() if num_tokens is None else num_tokens, device=sizes.device)
        per_sequence = (1 / (total.float().clamp(min=1) * accumulation_steps)).expand(len(sizes))
    return torch.where(mask != 0, spread(per_sequence, cu_seqlens, len(mask)), 0.0)


def spread(per_sequence: Tensor, cu_seqlens: Tensor, num_tokens: int | None = None) -> Tensor:
    """(N,) per-token copy of a per-sequence tensor (S,); with N = `num_tokens` given, a GPU need not synchronise."""
    return per_sequence.repeat_interleave(cu_seqlens.diff().long(), output_size=num_tokens)


# --- checks -------------------------------------------------------------------------------------------------------


def _sequence_level(logp: Tensor, entropy: Tensor, arguments: tuple, cu_seqlens: Tensor) -> GRPOLoss:
    """The loss where a token's ratio depends on its whole sequence: differentiable log-probs, then the reference."""
    _, advantages, weights, beta, _, old_logp, ref_logp, is_weights, surrogate, bounds, bias_corrected_kl = arguments
    clip_low, clip_high, delta, *sapo_temperatures = bounds
    per_token, kl, clipped, kl_limited = policy_loss_ref(
        logp, advantages, weights, beta=beta, old_logp=old_logp, ref_logp=ref_logp, clip_low=clip_low,
        clip_high=clip_high, delta=delta, surrogate=surrogate, sapo_temperatures=tuple(sapo_temperatures),
        ratio_level="sequence", cu_seqlens=cu_seqlens, is_weights=is_weights, bias_corrected_kl=bias_corrected_kl,
    )  # fmt: skip
    return GRPOLoss(per_token.sum(), logp.detach(), entropy.detach(), kl, clipped, kl_limited)


def _arguments(
    rows, targets, advantages, token_weights, beta, temperature, old_logp, ref_logp, clip_low, clip_high, delta,
    surrogate, sapo_temperatures, ratio_level, cu_seqlens, is_weights, bias_corrected_kl,
) -> tuple:  # fmt: skip
    """The operators' arguments after the logits: checked, per token, contiguous, in the statistics' dtype."""
    if surrogate not in SURROGATES:
        raise ValueError(f"surrogate is {surrogate!r}: choose one of {', '.join(SURROGATES)}")
    if ratio_level not in ("token", "sequence"):
        raise ValueError(f"ratio_level is {ratio_level!r}: choose token or sequence")
    if delta is not None and surrogate != "clip":
        raise ValueError(f"delta bounds the ratio of surrogate 'clip', not of {surrogate!r}: leave it out")
    if not min(sapo_temperatures) > 0:
        raise ValueError(f"sapo_temperatures is {sapo_temperatures}: expected two numbers > 0")
    for name, bound in {"clip_low": clip_low, "clip_high": clip_high, "delta": delta}.items():
        if bound is not None and not bound >= 0:
            raise ValueError(f"{name} is {bound}: expected a number ≥ 0")
    if ref_logp is None and (isinstance(beta, Tensor) or beta != 0):
        raise ValueError(f"beta is {beta}, but ref_logp is None: pass the reference log-probs, or beta=0")
    if cu_seqlens is not None:
        _check_cu_seqlens(cu_seqlens, rows)
    elif ratio_level == "sequence":
        raise ValueError("ratio_level is 'sequence', but cu_seqlens is None: pass the (S+1,) bounds of the sequences")

    def per_token(name: str, value: Tensor | None, per_sequence: bool = False) -> Tensor | None:
        if value is None:
            return None
        if not isinstance(value, Tensor):
            raise ValueError(f"{name} is a {type(value).__name__}: expected a tensor")
        sequences = cu_seqlens is not None and per_sequence and value.ndim == 1 and len(value) == len(cu_seqlens) - 1
        if value.shape != (len(rows),) and not sequences:
            alternative = f", or ({len(cu_seqlens) - 1},)" if cu_seqlens is not None and per_sequence else ""
            alternative += " (per-sequence values need cu_seqlens)" if cu_seqlens is None and per_sequence else ""
            raise ValueError(f"{name} has shape {tuple(value.shape)}: expected ({len(rows)},){alternative}")
        _check_device(name, value, rows)
        value = value.detach().to(statistics_dtype(rows))
        if value.shape != (len(rows),):
            value = spread(value, cu_seqlens, len(rows))
        return value.contiguous()

    return (
        targets.contiguous(),
        per_token("advantages", advantages, per_sequence=True),
        per_token("token_weights", token_weights),
        _scalar("beta", beta, rows),
        _scalar("temperature", temperature, rows),
        per_token("old_logp", old_logp),
        per_token("ref_logp", ref_logp),
        per_token("is_weights", is_weights, per_sequence=True),
        surrogate,
        [clip_low, clip_high, float("inf") if delta is None else delta, *sapo_temperatures],
        bias_corrected_kl,
    )


def _check_logits(logits: Tensor, targets: Tensor, inplace: bool = False) -> Tensor:
    """The logits with unit column stride."""
    if logits.ndim != 2:
        raise ValueError(f"logits has shape {tuple(logits.shape)}: expected (N, V), flatten batch and length first")
    if logits.shape[1] == 0:
        raise ValueError(f"logits has shape {tuple(logits.shape)}: expected a vocabulary of at least 1")
    if logits.dtype not in DTYPES:
        raise ValueError(f"logits is {logits.dtype}: expected float32, bfloat16, float16 or float64")
    _check_targets(targets, logits, logits.shape[1])
    unit_stride = logits.stride(1) == 1 or logits.shape[1] == 1
    if inplace and logits.requires_grad and torch.is_grad_enabled():
        if logits.is_leaf:
            raise ValueError(
                f"inplace would overwrite logits of shape {tuple(logits.shape)}, which is a leaf that requires a "
                "gradient: pass the output of a layer, or inplace=False"
            )
        if not unit_stride:
            raise ValueError(f"inplace needs rows of unit stride, logits has strides {logits.stride()}: inplace=False")
        if len(logits) > 1 and logits.stride(0) < logits.shape[1]:
            raise ValueError(f"inplace needs rows of their own, logits has strides {logits.stride()}: inplace=False")
        if not torch.compiler.is_compiling() and _saved_by_producer(logits):
            raise ValueError(
                f"inplace would overwrite logits of shape {tuple(logits.shape)}, which {logits.grad_fn.name()} still "
                "needs for its own gradient: pass inplace=False"
            )
    return logits if unit_stride else logits.contiguous()


def _saved_by_producer(tensor: Tensor) -> bool:
    """Whether the operation that made this tensor keeps it for its backward, as exp or tanh do."""
    node = tensor.grad_fn
    for name in dir(node):
        if name.startswith("_saved_") and not name.startswith("_saved_raw"):
            saved = getattr(node, name, None)
            if isinstance(saved, Tensor) and saved.data_ptr() == tensor.data_ptr() and tensor.numel():
                return True
    return False


def _check_linear(hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> tuple:
    """hidden, weight and bias in the dtype that the products run in."""
    if hidden.ndim != 2:
        raise ValueError(f"hidden has shape {tuple(hidden.shape)}: expected (N, D), the packed rows that carry loss")
    if weight.ndim != 2 or weight.shape[1] != hidden.shape[1] or weight.shape[0] == 0:
        raise ValueError(f"weight has shape {tuple(weight.shape)}: expected (V, {hidden.shape[1]}) as hidden has")
    if bias is not None and bias.shape != (weight.shape[0],):
        raise ValueError(f"bias has shape {tuple(bias.shape)}: expected ({weight.shape[0]},)")
    for name, value in {"weight": weight, "bias": bias}.items():
        if value is not None:
            _check_device(name, value, hidden)
    _check_targets(targets, hidden, weight.shape[0])
    if torch.is_autocast_enabled(hidden.device.type):
        dtype = torch.get_autocast_dtype(hidden.device.type)
        hidden, weight, bias = hidden.to(dtype), weight.to(dtype), None if bias is None else bias.to(dtype)
    for name, value in {"hidden": hidden, "weight": weight, "bias": bias}.items():
        if value is not None and (value.dtype not in DTYPES or value.dtype != hidden.dtype):
            raise ValueError(f"{name} is {value.dtype}: expected float32, bfloat16, float16 or float64, as hidden is")
    return hidden, weight, bias


def _check_targets(targets: Tensor, rows: Tensor, v: int) -> None:
    if targets.shape != (len(rows),) or targets.dtype != torch.int64:
        raise ValueError(f"targets is {targets.dtype} {tuple(targets.shape)}: expected torch.int64 ({len(rows)},)")
    _check_device("targets", targets, rows)
    readable = targets.device.type == "cpu" and not torch.compiler.is_compiling()  # elsewhere it would synchronise
    if readable and len(targets) and not (targets.min() >= 0 and targets.max() < v):
        bad = targets[(targets < 0) | (targets >= v)][0].item()
        raise ValueError(f"targets holds {bad}: expected values in [0, {v}); give masked tokens weight 0, not -100")


def _check_cu_seqlens(cu_seqlens: Tensor, rows: Tensor) -> None:
    if cu_seqlens.ndim != 1 or len(cu_seqlens) < 1 or cu_seqlens.is_floating_point():
        raise ValueError(f"cu_seqlens is {cu_seqlens.dtype} {tuple(cu_seqlens.shape)}: expected integers (S+1,)")
    _check_device("cu_seqlens", cu_seqlens, rows)
    if cu_seqlens.device.type == "cpu" and not torch.compiler.is_compiling():
        ends = cu_seqlens.tolist()
        if ends[0] != 0 or ends[-1] != len(rows) or ends != sorted(ends):
            raise ValueError(f"cu_seqlens is {ends}: expected 0, then increasing ends, the last being {len(rows)}")


def _check_device(name: str, value: Tensor, rows: Tensor) -> None:
    if value.device != rows.device:
        raise ValueError(f"{name} is on {value.device}: expected {rows.device}, where the logits or hidden states are")


def _scalar(name: str, value: float | Tensor, rows: Tensor) -> Tensor:
    """A 0-d tensor beside the rows, which kernels read at run time."""
    dtype = statistics_dtype(rows)
    if isinstance(value, Tensor):
        if value.numel() != 1:
            raise ValueError(f"{name} has shape {tuple(value.shape)}: expected a float or a 0-d tensor")
        return value.detach().reshape(()).to(rows.device, dtype)
    if name == "temperature" and not value > 0:
        raise ValueError(f"temperature is {value}: expected a number > 0")
    return torch.full((), value, dtype=dtype, device=rows.device)


def _budget(chunk_bytes: int | None, hidden: Tensor) -> int:
    if chunk_bytes is None:
        return CHUNK_BYTES.get(hidden.device.type, CHUNK_BYTES["cuda"])
    if chunk_bytes <= 0:
        raise ValueError(f"chunk_bytes is {chunk_bytes}: expected a number of bytes > 0")
    return chunk_bytes
