"""Liger-Kernel's GRPO functions on this package's kernels: a change of import is the whole migration.

    from mr1_fast.integrations.liger import LigerFusedLinearGRPOLoss, fused_selective_log_softmax, triton_grpo_loss

Arguments, defaults and what is returned are those of liger-kernel 0.8.5, and so are losses, metrics and gradients, to
rounding. Liger itself is needed for loss_type "vespo" alone, which is handed to it. Where we differ:

- k3: its log-ratio is bounded at ±20; Liger's exponential overflows, and NaN reaches the weights.
- luspo: Liger's loss on hidden states adds up the padding too, gradient and all; here tokens that count have its
  weights, others none. On logits with reduce=True, its backward gives tokens the lengths of other sequences, and reads
  past the last one; here the gradient is that of the loss.
- sequence level goes with cispo and sapo too, which Liger refuses.
- `advantages` may be per token, (B, T). β and temperature may be 0-d tensors; no new value of anything compiles.

Masks are of 0 and 1. Letters: B sequences, T (or L) tokens each, D hidden size, V vocabulary.
"""

from importlib import import_module
from inspect import signature

import torch
from torch import Tensor, nn

from ..kernels.grpo.operators import InplaceTokenLogprobs
from ..kernels.grpo.reference import policy_loss_ref
from ..loss import linear_grpo_loss, linear_token_logprobs, token_logprobs, token_weights
from ..loss.arguments import check_logits, scalar
from . import check_version, warn_once
from .head import in_dtype_of
from .objective import AVERAGES, objective_options, packed_rows, per_token

__all__ = ["LigerFusedLinearGRPOLoss", "fused_selective_log_softmax", "triton_grpo_loss"]

check_version("liger-kernel")


class LigerFusedLinearGRPOLoss(nn.Module):
    """Liger's loss on hidden states with the LM head fused in, by `linear_grpo_loss`.

    Every setting is an attribute that may be changed between calls. `compiled` and `chunk_size` are accepted and have
    no effect. `epsilon_high` is the cap itself for cispo, else 1 + epsilon_high is. `delta` acts on neither cispo nor
    sapo, and is left out of the clip ratio. With `use_ref_model=False` the reference is the policy itself: KL = 0.
    """

    def __init__(
        self, beta=0.04, compiled=True, use_ref_model=True, chunk_size=1, epsilon_low=0.2, epsilon_high=0.2,
        loss_type="dapo", max_completion_length=None, importance_sampling_level="token", sapo_temperature_pos=1.0,
        sapo_temperature_neg=1.05, temperature=1.0, delta=None, use_bias_correction_kl=False, vespo_k_pos=2.0,
        vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0,
    ):  # fmt: skip
        super().__init__()
        positive = dict(
            sapo_temperature_pos=sapo_temperature_pos, sapo_temperature_neg=sapo_temperature_neg
        )
        _check_positive(**positive, delta=1 if delta is None else delta)
        self.beta, self.temperature, self.use_ref_model = beta, temperature, use_ref_model
        self.compiled, self.chunk_size = compiled, chunk_size
        self.loss_type, self.max_completion_length = loss_type, max_completion_length
        self.epsilon_low, self.epsilon_high, self.delta = epsilon_low, epsilon_high, delta
        self.importance_sampling_level = importance_sampling_level
        self.sapo_temperature_pos, self.sapo_temperature_neg = (
            sapo_temperature_pos,
            sapo_temperature_neg,
        )
        self.use_bias_correction_kl = use_bias_correction_kl
        self.vespo_k_pos, self.vespo_lambda_pos = vespo_k_pos, vespo_lambda_pos
        self.vespo_k_neg, self.vespo_lambda_neg = vespo_k_neg, vespo_lambda_neg

    def forward(
        self, _input, lin_weight, selected_token_ids, attention_mask, advantages, bias=None, ref_per_token_logps=None,
        old_per_token_logps=None, ref_input=None, ref_weight=None, ref_bias=None, vllm_is_ratio=None,
        num_items_in_batch=None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
        """Return the loss and (kl_mean if β ≠ 0, clip_ratio), detached; a β that is a tensor counts as not 0.

        - _input (B, T, D), lin_weight (V, D), bias (V,); ref_input (B, T, D'), ref_weight (V, D'), ref_bias (V,)
        - selected_token_ids (B, T); attention_mask (B, T): tokens that count; others are never projected
        - ref_per_token_logps, old_per_token_logps (B, T); advantages, vllm_is_ratio (B,), (B, 1) or (B, T)
        - num_items_in_batch: tokens that dapo and cispo divide by, over all processes; None: those of this call

        Backward runs once per call. Raises ValueError.
        """
        if self.loss_type == "vespo":
            inputs = {name: value for name, value in locals().items() if name != "self"}
            settings = {
                name: getattr(self, name) for name in signature(LigerFusedLinearGRPOLoss).parameters
            }
            return _liger("chunked_loss", "LigerFusedLinearGRPOLoss")(**settings)(**inputs)
        if (
            _input.shape[:-1] != attention_mask.shape
            or selected_token_ids.shape != attention_mask.shape
        ):
            raise ValueError(
                f"_input, selected_token_ids and attention_mask have shapes {tuple(_input.shape)}, "
                f"{tuple(selected_token_ids.shape)} and {tuple(attention_mask.shape)}: expected (B, T, D) and (B, T)"
            )
        objective = _objective(
            self.loss_type, self.importance_sampling_level, self.epsilon_low, self.epsilon_high, self.delta,
            self.sapo_temperature_pos, self.sapo_temperature_neg, self.use_bias_correction_kl,
        )  # fmt: skip
        mask = attention_mask.float()
        rows, cu_seqlens = packed_rows(mask)

        def packed(name: str, value: Tensor | None) -> Tensor | None:
            return None if value is None else per_token(name, value, mask).flatten()[rows]

        with_kl = _is_on(self.beta)
        per_sequence = vllm_is_ratio is None or vllm_is_ratio.shape != mask.shape
        per_sequence = per_sequence and not with_kl and self.importance_sampling_level == "sequence"
        weights = _weights(
            mask, self.loss_type, self.max_completion_length, num_items_in_batch, per_sequence
        )
        targets = selected_token_ids.flatten()[rows].long()
        ref_logp = None
        if with_kl and self.use_ref_model:
            ref_logp = packed("ref_per_token_logps", ref_per_token_logps)
            ref_logp = (
                self._reference(ref_input, ref_weight, ref_bias, rows, targets)
                if ref_logp is None
                else ref_logp
            )
        objective |= dict(
            old_logp=packed("old_per_token_logps", old_per_token_logps),
            is_weights=packed("vllm_is_ratio", vllm_is_ratio),
            cu_seqlens=cu_seqlens,
        )
        hidden = _input.flatten(0, 1)[rows]
        head, bias = in_dtype_of(hidden, lin_weight, bias)
        advantages, weights = packed("advantages", advantages), weights.flatten()[rows]
        result = linear_grpo_loss(
            hidden, head, targets, advantages, weights, beta=0.0 if ref_logp is None else self.beta, ref_logp=ref_logp,
            temperature=self.temperature, bias=bias, **objective,
        )  # fmt: skip
        clipped = _clipped(result.clipped, result.logp, advantages, weights, objective)
        return result.loss, tuple(_means(mask, result.kl if with_kl else None, clipped))

    def _reference(self, ref_input, ref_weight, ref_bias, rows: Tensor, targets: Tensor) -> Tensor:
        """(N,) log-probs of the reference model from its hidden states."""
        if ref_input is None or ref_weight is None:
            raise ValueError(
                f"beta is {self.beta}, but there is no reference: pass ref_per_token_logps, or ref_input with "
                "ref_weight, or set use_ref_model=False"
            )
        hidden = ref_input.flatten(0, 1)[rows]
        head, bias = in_dtype_of(hidden, ref_weight, ref_bias)
        with torch.no_grad():
            return linear_token_logprobs(hidden, head, targets, self.temperature, bias)[0]


def triton_grpo_loss(
    logits, old_logp, ref_logp, completion_ids, advantages, completion_mask=None, temperature=0.9, beta=0.04,
    eps_low=0.2, eps_high=0.4, inplace=True, loss_type="dapo", max_completion_length=None,
    importance_sampling_level="token", reduce=False, sapo_temperature_pos=1.0, sapo_temperature_neg=1.05,
    vllm_is_ratio=None, delta=None, use_bias_correction_kl=False, num_items_in_batch=None, vespo_k_pos=2.0,
    vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0,
):  # fmt: skip
    """Liger's loss on logits (B, L+1, V), the last position of each sequence left out.

    `reduce=False` returns the loss of each token, before any averaging, KL (None where β = 0) and is_clipped, all
    (B, L) fp32 and 0 where masked; `reduce=True` returns the loss and [kl_mean if β ≠ 0, clip_ratio]. Only the loss
    has a gradient; a β that is a tensor counts as not 0.

    - completion_ids, completion_mask, old_logp, ref_logp (B, L); advantages, vllm_is_ratio (B,), (B, 1) or (B, L)
    - eps_high is the cap itself for cispo; delta 0 is none; max_completion_length is L unless given
    - inplace: the backward, not the forward, puts the gradient in the place of the logits, so that no second tensor of
      their size exists. A slice of longer logits is taken as it is, sequence by sequence, and all around it is left
      alone; with inplace=False it is copied. Autograd raises where something else still needs the logits as they were,
      a second backward too. A leaf then shares its memory with its gradient. Under torch.compile, which plans memory
      itself, inplace has no effect.

    Raises ValueError.
    """
    if loss_type == "vespo":
        return _liger("transformers.grpo_loss", "triton_grpo_loss")(**locals())
    if delta and loss_type in ("cispo", "sapo"):
        raise ValueError(f"delta is {delta}, but {loss_type} has no such bound: leave it out")
    objective = _objective(
        loss_type, importance_sampling_level, eps_low, eps_high, delta, sapo_temperature_pos, sapo_temperature_neg,
        use_bias_correction_kl,
    )  # fmt: skip
    with_kl = _is_on(beta)
    if with_kl and ref_logp is None:
        raise ValueError(
            f"beta is {beta}, but ref_logp is None: pass the reference log-probs, or beta=0"
        )
    mask = (torch.ones_like(completion_ids) if completion_mask is None else completion_mask).float()
    logp = _logprobs(logits, completion_ids.masked_fill(mask == 0, 0), temperature, inplace)

    def flat(name: str, value: Tensor | None) -> Tensor | None:
        return None if value is None else per_token(name, value, mask).flatten().to(logp.dtype)

    length = mask.shape[1]
    weights = (
        _weights(mask, loss_type, max_completion_length or length, num_items_in_batch)
        if reduce
        else mask
    )
    objective |= dict(
        old_logp=flat("old_logp", old_logp),
        is_weights=flat("vllm_is_ratio", vllm_is_ratio),
        cu_seqlens=length * torch.arange(len(mask) + 1, device=mask.device),
    )
    advantages, weights = flat("advantages", advantages), weights.flatten()
    loss, kl, clipped, _ = policy_loss_ref(
        logp.flatten(), advantages, weights, beta=beta, ref_logp=flat("ref_logp", ref_logp) if with_kl else None,
        **objective,
    )  # fmt: skip
    kl = kl if with_kl else None
    is_clipped = _clipped(clipped, logp.detach().flatten(), advantages, weights, objective).float()
    if reduce:
        return loss.sum(), _means(mask, kl, is_clipped)
    return tuple(None if value is None else value.view_as(mask) for value in (loss, kl, is_clipped))


@torch.no_grad()
def fused_selective_log_softmax(logits, input_ids, temperature=0.9, mask=None) -> Tensor:
    """(B, L) fp32 log-probs, without gradient, of the last L of `input_ids` under logits (B, L+1, V) / temperature.

    The last position of the logits is left out. Where the last L of `mask` are 0, so is the result. Logits may be a
    slice of longer ones.
    """
    length = logits.shape[1] - 1
    ids = input_ids[:, input_ids.shape[1] - length :]
    masked = torch.zeros_like(ids) != 0 if mask is None else mask[:, mask.shape[1] - length :] == 0
    return _logprobs(logits, ids.masked_fill(masked, 0), temperature, inplace=True).masked_fill(
        masked, 0.0
    )


def _logprobs(logits: Tensor, ids: Tensor, temperature: float | Tensor, inplace: bool) -> Tensor:
    """(B, L) log-probs of ids (B, L) under logits (B, L+1, V)."""
    if logits.ndim != 3 or ids.shape != (len(logits), logits.shape[1] - 1):
        raise ValueError(
            f"logits and completion ids have shapes {tuple(logits.shape)} and {tuple(ids.shape)}: expected (B, L+1, V) "
            "and (B, L)"
        )
    targets = nn.functional.pad(
        ids.long(), (0, 1)
    )  # any token for the last position, whose gradient is 0
    if not inplace or torch.compiler.is_compiling():
        return token_logprobs(logits.flatten(0, 1), targets.flatten(), temperature)[0].view_as(
            targets
        )[:, :-1]
    near, far = sorted(((logits.stride(0), logits.shape[0]), (logits.stride(1), logits.shape[1])))
    if (
        logits.stride(2) != 1 or near[0] < logits.shape[2] or far[0] < near[0] * near[1]
    ):  # rows overlap
        logits = logits.contiguous()
    for sequence in zip(logits.detach(), targets, strict=True):
        check_logits(*sequence)
    return InplaceTokenLogprobs.apply(logits, targets, scalar("temperature", temperature, logits))[
        :, :-1
    ]


def _objective(loss_type, level, low, high, delta, positive, negative, bias_corrected_kl) -> dict:
    """Our names for what Liger's settings say of a token's loss."""
    if loss_type not in AVERAGES:
        raise ValueError(f"loss_type is {loss_type!r}: choose one of {', '.join(AVERAGES)}, vespo")
    if level not in ("token", "sequence"):
        raise ValueError(f"importance_sampling_level is {level!r}: choose token or sequence")
    _check_positive(sapo_temperature_pos=positive, sapo_temperature_neg=negative)
    return objective_options(
        loss_type, level, low, high, delta or None, (positive, negative), bias_corrected_kl
    )


def _check_positive(**settings: float) -> None:
    for name, value in settings.items():
        if not value > 0:
            raise ValueError(f"{name} is {value}: expected a number > 0")


def _weights(
    mask: Tensor, loss_type, max_completion_length, num_items_in_batch, per_sequence: bool = False
) -> Tensor:
    """(B, T): what a token's loss is multiplied by, so that the sum is the average that `loss_type` names.

    `per_sequence`: the loss is (B, 1) in Liger, where luspo's mean over all entries is one over B instead of B·T.
    """
    if loss_type == "luspo" and not per_sequence:
        return mask * mask.sum(-1, keepdim=True) / mask.numel()
    average = AVERAGES[loss_type]
    ends = mask.shape[1] * torch.arange(len(mask) + 1, device=mask.device)
    num_tokens = _tokens_per_process(mask, num_items_in_batch) if average == "dapo" else None
    options = {
        "num_tokens": num_tokens,
        "max_completion_length": max_completion_length,
        "mask": mask.flatten(),
    }
    return token_weights(ends, average, **options).view_as(mask)


def _tokens_per_process(mask: Tensor, num_items_in_batch: int | Tensor | None) -> Tensor:
    """() What dapo and cispo divide by: tokens over all processes / processes, at least 1."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if num_items_in_batch is None:
        tokens = mask.sum()
        if distributed:
            torch.distributed.all_reduce(tokens)
    else:
        tokens = torch.as_tensor(num_items_in_batch, dtype=torch.float32, device=mask.device)
    return (tokens / (torch.distributed.get_world_size() if distributed else 1)).clamp(min=1)


def _clipped(
    ours: Tensor, logp: Tensor, advantages: Tensor, weights: Tensor, objective: dict
) -> Tensor:
    """(N,) bool, as Liger counts: `delta` is no clip to it, which it is in `ours`."""
    if objective["delta"] is None:
        return ours
    return policy_loss_ref(logp, advantages, weights, beta=0.0, **objective | {"delta": None})[2]


def _means(mask: Tensor, kl: Tensor | None, clipped: Tensor) -> list[Tensor]:
    """Liger's metrics: the means over the tokens that count."""
    total = mask.sum().clamp(min=1)
    return [value.sum() / total for value in (kl, clipped) if value is not None]


def _is_on(beta: float | Tensor) -> bool:
    """Whether there is a KL term; asking a tensor would synchronise, so it counts as one."""
    return isinstance(beta, Tensor) or beta != 0


def _liger(module: str, name: str):
    """Liger's own, for the one loss that ours does not express."""
    try:
        own = getattr(import_module(f"liger_kernel.{module}"), name)
    except ImportError as error:
        raise ImportError(
            "loss_type 'vespo' is left to Liger-Kernel: pip install liger-kernel, or choose another loss_type"
        ) from error
    warn_once("loss_type 'vespo' is none of mr1_fast's: Liger-Kernel itself computes it")
    return own
