"""Liger-Kernel's GRPO functions on this package's kernels: migrating takes a change of import.

    from mr1_fast.integrations.liger import LigerFusedLinearGRPOLoss, triton_grpo_loss

Arguments, defaults and return values are those of liger-kernel 0.8.5. Losses, metrics and gradients
equal Liger's up to rounding. Liger itself is needed only for loss_type "vespo", which is passed on
to it. The differences:

- KL: the log-ratio inside k3 is bounded at ±20. Liger's exponential overflows, and NaN reaches the
  weights.
- luspo on hidden states: Liger's loss includes the padding, with gradients. Here padding
  contributes nothing, and the other tokens have Liger's weights.
- luspo on logits with reduce=True: Liger's backward gives tokens the lengths of other sequences and
  reads past the last one. Here the gradient is that of the loss.
- cispo and sapo work at the sequence level too, which Liger refuses.
- `advantages` may be per token, (B, T). β and temperature may be 0-d tensors, and no new value of
  any setting compiles anything.

Masks hold 0 and 1. Letters: B sequences of T (or L) tokens, D hidden size, V vocabulary size.
"""

from importlib import import_module
from inspect import signature

import torch
from torch import Tensor, nn

from ..kernels.grpo.operators import InplaceTokenLogprobs
from ..loss import (
    linear_grpo_loss,
    linear_token_logprobs,
    policy_loss_ref,
    token_logprobs,
    token_weights,
)
from ..loss.arguments import check_weighted_logits, scalar
from . import check_version, warn_once
from .head import in_dtype_of
from .loss_options import AVERAGES, loss_options, per_token, rows_with_loss

__all__ = ["LigerFusedLinearGRPOLoss", "fused_selective_log_softmax", "triton_grpo_loss"]

check_version("liger-kernel")


class LigerFusedLinearGRPOLoss(nn.Module):
    """Liger's GRPO loss on hidden states, LM head included, computed by `linear_grpo_loss`.

    Every setting is an attribute that may be changed between calls. `compiled` and `chunk_size` are
    accepted and have no effect. For cispo, `epsilon_high` is the cap of the ratio itself; for other
    losses the cap is 1 + epsilon_high. `delta` has no effect on cispo and sapo, and does not count
    in the clip ratio. With `use_ref_model=False` the policy is its own reference, so the KL is 0.
    """

    def __init__(
        self, beta=0.04, compiled=True, use_ref_model=True, chunk_size=1, epsilon_low=0.2,
        epsilon_high=0.2, loss_type="dapo", max_completion_length=None,
        importance_sampling_level="token", sapo_temperature_pos=1.0, sapo_temperature_neg=1.05,
        temperature=1.0, delta=None, use_bias_correction_kl=False, vespo_k_pos=2.0,
        vespo_lambda_pos=3.0, vespo_k_neg=3.0, vespo_lambda_neg=2.0,
    ):  # fmt: skip
        super().__init__()
        _check_positive(
            sapo_temperature_pos=sapo_temperature_pos,
            sapo_temperature_neg=sapo_temperature_neg,
            delta=1 if delta is None else delta,
        )
        self.beta, self.temperature, self.use_ref_model = beta, temperature, use_ref_model
        self.compiled, self.chunk_size = compiled, chunk_size
        self.loss_type, self.max_completion_length = loss_type, max_completion_length
        self.importance_sampling_level = importance_sampling_level
        self.epsilon_low, self.epsilon_high, self.delta = epsilon_low, epsilon_high, delta
        self.sapo_temperature_pos = sapo_temperature_pos
        self.sapo_temperature_neg = sapo_temperature_neg
        self.use_bias_correction_kl = use_bias_correction_kl
        self.vespo_k_pos, self.vespo_lambda_pos = vespo_k_pos, vespo_lambda_pos
        self.vespo_k_neg, self.vespo_lambda_neg = vespo_k_neg, vespo_lambda_neg

    def forward(
        self, _input, lin_weight, selected_token_ids, attention_mask, advantages, bias=None,
        ref_per_token_logps=None, old_per_token_logps=None, ref_input=None, ref_weight=None,
        ref_bias=None, vllm_is_ratio=None, num_items_in_batch=None,
    ) -> tuple[Tensor, tuple[Tensor, ...]]:  # fmt: skip
        """Return the loss and Liger's metrics, (kl_mean, clip_ratio), or (clip_ratio,) if β = 0.

        The metrics are detached. A tensor β counts as not 0.

        - _input (B, T, D), lin_weight (V, D), bias (V,); for the reference model, ref_input (B, T,
          D'), ref_weight (V, D'), ref_bias (V,)
        - selected_token_ids (B, T); attention_mask (B, T): tokens with 0 are never projected
        - ref_per_token_logps, old_per_token_logps (B, T)
        - advantages, vllm_is_ratio (B,), (B, 1) or (B, T)
        - num_items_in_batch: the number of tokens, over all processes, by which dapo and cispo
          divide; None: the number in this call

        Backward may run once per call. Raises ValueError for wrong shapes or settings.
        """
        if self.loss_type == "vespo":
            inputs = {name: value for name, value in locals().items() if name != "self"}
            names = signature(LigerFusedLinearGRPOLoss).parameters
            settings = {name: getattr(self, name) for name in names}
            return _liger("chunked_loss", "LigerFusedLinearGRPOLoss")(**settings)(**inputs)
        shapes = _input.shape[:-1], selected_token_ids.shape
        if any(shape != attention_mask.shape for shape in shapes):
            raise ValueError(
                f"_input, selected_token_ids and attention_mask have shapes {tuple(_input.shape)}, "
                f"{tuple(selected_token_ids.shape)} and {tuple(attention_mask.shape)}: expected "
                "(B, T, D) and (B, T)"
            )
        options = _options(
            self.loss_type, self.importance_sampling_level, self.epsilon_low, self.epsilon_high,
            self.delta, self.sapo_temperature_pos, self.sapo_temperature_neg,
            self.use_bias_correction_kl,
        )  # fmt: skip
        mask = attention_mask.float()
        rows, cu_seqlens = rows_with_loss(mask)

        def packed(name: str, value: Tensor | None) -> Tensor | None:
            return None if value is None else per_token(name, value, mask).flatten()[rows]

        targets = selected_token_ids.flatten()[rows].long()
        with_kl, ref_logp = _has_kl(self.beta), None
        if with_kl and self.use_ref_model:
            ref_logp = packed("ref_per_token_logps", ref_per_token_logps)
            if ref_logp is None:
                ref_logp = self._reference(ref_input, ref_weight, ref_bias, rows, targets)
        options |= {
            "old_logp": packed("old_per_token_logps", old_per_token_logps),
            "is_weights": packed("vllm_is_ratio", vllm_is_ratio),
            "cu_seqlens": cu_seqlens,
        }

        # Liger's loss is (B, 1), one value per sequence, where nothing in it differs between
        # tokens.
        by_sequence = self.importance_sampling_level == "sequence" and not with_kl
        if vllm_is_ratio is not None and vllm_is_ratio.shape == mask.shape:
            by_sequence = False
        weights = _weights(
            mask, self.loss_type, self.max_completion_length, num_items_in_batch, by_sequence
        ).flatten()[rows]
        advantages = packed("advantages", advantages)
        hidden = _input.flatten(0, 1)[rows]
        lin_weight, bias = in_dtype_of(hidden, lin_weight, bias)
        result = linear_grpo_loss(
            hidden, lin_weight, targets, advantages, weights, bias=bias, ref_logp=ref_logp,
            beta=0.0 if ref_logp is None else self.beta, temperature=self.temperature, **options,
        )  # fmt: skip
        clipped = _clipped(result.clipped, result.logp, advantages, weights, options)
        return result.loss, tuple(_means(mask, result.kl if with_kl else None, clipped))

    def _reference(self, ref_input, ref_weight, ref_bias, rows: Tensor, targets: Tensor) -> Tensor:
        """The reference model's log-probs (N,), from its hidden states."""
        if ref_input is None or ref_weight is None:
            raise ValueError(
                f"beta is {self.beta}, but there is no reference: pass ref_per_token_logps, or "
                "ref_input with ref_weight, or set use_ref_model=False"
            )
        hidden = ref_input.flatten(0, 1)[rows]
        weight, bias = in_dtype_of(hidden, ref_weight, ref_bias)
        with torch.no_grad():
            return linear_token_logprobs(hidden, weight, targets, self.temperature, bias)[0]


def triton_grpo_loss(
    logits, old_logp, ref_logp, completion_ids, advantages, completion_mask=None, temperature=0.9,
    beta=0.04, eps_low=0.2, eps_high=0.4, inplace=True, loss_type="dapo",
    max_completion_length=None, importance_sampling_level="token", reduce=False,
    sapo_temperature_pos=1.0, sapo_temperature_neg=1.05, vllm_is_ratio=None, delta=None,
    use_bias_correction_kl=False, num_items_in_batch=None, vespo_k_pos=2.0, vespo_lambda_pos=3.0,
    vespo_k_neg=3.0, vespo_lambda_neg=2.0,
):  # fmt: skip
    """Compute Liger's GRPO loss on logits (B, L+1, V), whose last position is ignored.

    With `reduce=False`, return three (B, L) fp32 tensors that are 0 where masked: the loss of each
    token before averaging, its KL (None if β = 0), and is_clipped. With `reduce=True`, return the
    loss and the list [kl_mean if β ≠ 0, clip_ratio]. Only the loss has a gradient; a tensor β
    counts as ≠ 0.

    - completion_ids, completion_mask, old_logp, ref_logp (B, L)
    - advantages, vllm_is_ratio (B,), (B, 1) or (B, L)
    - eps_high: for cispo the cap of the ratio itself, for other losses the cap is 1 + eps_high
    - delta: None and 0 mean no bound; max_completion_length: None means L
    - completion_mask: the logits of masked positions are not read, and their ids may be any numbers
    - inplace: the backward overwrites the logits with their gradient, so no second tensor of their
      size exists. The forward leaves them unchanged. A slice of longer logits is used as it is, and
      what surrounds it stays unchanged; with inplace=False it is copied. Autograd raises if another
      operation still needs the logits, also for a second backward. If the logits are a leaf, they
      share memory with their gradient. torch.compile plans memory itself, so inplace has no effect
      there.

    Raises ValueError for wrong shapes or settings.
    """
    if loss_type == "vespo":
        return _liger("transformers.grpo_loss", "triton_grpo_loss")(**locals())
    if delta and loss_type in ("cispo", "sapo"):
        raise ValueError(f"delta is {delta}, but {loss_type} has no such bound: leave it out")
    options = _options(
        loss_type, importance_sampling_level, eps_low, eps_high, delta, sapo_temperature_pos,
        sapo_temperature_neg, use_bias_correction_kl,
    )  # fmt: skip
    with_kl = _has_kl(beta)
    if with_kl and ref_logp is None:
        raise ValueError(
            f"beta is {beta}, but ref_logp is None: pass the reference log-probs, or beta=0"
        )
    mask = (torch.ones_like(completion_ids) if completion_mask is None else completion_mask).float()
    logp = _logprobs(logits, completion_ids, mask, temperature, inplace)

    def flat(name: str, value: Tensor | None) -> Tensor | None:
        return None if value is None else per_token(name, value, mask).flatten().to(logp.dtype)

    length = mask.shape[1]
    options |= {
        "old_logp": flat("old_logp", old_logp),
        "is_weights": flat("vllm_is_ratio", vllm_is_ratio),
        "cu_seqlens": length * torch.arange(len(mask) + 1, device=mask.device),
    }
    weights = mask
    if reduce:
        weights = _weights(mask, loss_type, max_completion_length or length, num_items_in_batch)
    advantages, weights = flat("advantages", advantages), weights.flatten()
    ref_logp = flat("ref_logp", ref_logp) if with_kl else None
    loss, kl, clipped, _ = policy_loss_ref(
        logp.flatten(), advantages, weights, beta=beta, ref_logp=ref_logp, **options
    )
    kl = kl if with_kl else None
    is_clipped = _clipped(clipped, logp.detach().flatten(), advantages, weights, options).float()
    if reduce:
        return loss.sum(), _means(mask, kl, is_clipped)
    return tuple(None if value is None else value.view_as(mask) for value in (loss, kl, is_clipped))


@torch.no_grad()
def fused_selective_log_softmax(logits, input_ids, temperature=0.9, mask=None) -> Tensor:
    """Return fp32 log-probs (B, L) of the last L of `input_ids`, without a gradient.

    They are taken under logits (B, L+1, V) / temperature, whose last position is ignored, and are 0
    where the last L of `mask` are 0: there, no logits are read. The logits may be a slice of longer
    ones.
    """
    length = logits.shape[1] - 1
    ids = input_ids[:, input_ids.shape[1] - length :]
    mask = torch.ones_like(ids) if mask is None else mask[:, mask.shape[1] - length :]
    return _logprobs(logits, ids, mask.float(), temperature, inplace=True)


def _logprobs(
    logits: Tensor, ids: Tensor, mask: Tensor, temperature: float | Tensor, inplace: bool
) -> Tensor:
    """Log-probs (B, L) of ids (B, L) under logits (B, L+1, V), 0 where mask (B, L) is 0.

    Logits of masked positions, and of the last position, are not read.
    """
    rows_agree = logits.ndim == 3 and ids.shape == (len(logits), logits.shape[1] - 1)
    if not rows_agree or mask.shape != ids.shape:
        raise ValueError(
            f"logits, completion ids and mask have shapes {tuple(logits.shape)}, "
            f"{tuple(ids.shape)} and {tuple(mask.shape)}: expected (B, L+1, V), (B, L) and (B, L)"
        )
    targets, weights = (nn.functional.pad(each, (0, 1)) for each in (ids.long(), mask))
    if not inplace or torch.compiler.is_compiling():
        rows = logits.flatten(0, 1), targets.flatten(), temperature, weights.flatten()
        return token_logprobs(*rows)[0].view_as(targets)[:, :-1]
    if _rows_overlap(logits):
        logits = logits.contiguous()
    for sequence in zip(logits.detach(), targets, weights, strict=True):
        check_weighted_logits(*sequence)
    temperature = scalar("temperature", temperature, logits)
    return InplaceTokenLogprobs.apply(logits, targets, temperature, weights)[:, :-1]


def _rows_overlap(logits: Tensor) -> bool:
    """Whether rows of logits (B, R, V) share memory, or their columns are not adjacent."""
    dimensions = [(logits.stride(i), logits.shape[i]) for i in (0, 1)]
    (near_stride, near_size), (far_stride, _) = sorted(dimensions)
    return (
        logits.stride(2) != 1
        or near_stride < logits.shape[2]
        or far_stride < near_stride * near_size
    )


def _options(
    loss_type, level, epsilon_low, epsilon_high, delta, sapo_positive, sapo_negative, corrected_kl
) -> dict:
    """Check Liger's settings and return them as keyword arguments of this package's loss."""
    if loss_type not in AVERAGES:
        raise ValueError(f"loss_type is {loss_type!r}: choose one of {', '.join(AVERAGES)}, vespo")
    if level not in ("token", "sequence"):
        raise ValueError(f"importance_sampling_level is {level!r}: choose token or sequence")
    _check_positive(sapo_temperature_pos=sapo_positive, sapo_temperature_neg=sapo_negative)
    return loss_options(
        loss_type,
        level=level,
        epsilon_low=epsilon_low,
        epsilon_high=epsilon_high,
        delta=delta or None,
        sapo_temperatures=(sapo_positive, sapo_negative),
        bias_corrected_kl=corrected_kl,
    )


def _check_positive(**settings: float) -> None:
    for name, value in settings.items():
        if not value > 0:
            raise ValueError(f"{name} is {value}: expected a number > 0")


def _weights(
    mask: Tensor, loss_type, max_completion_length, num_items_in_batch, by_sequence: bool = False
) -> Tensor:
    """Token weights (B, T) whose weighted sum of losses is the average that `loss_type` names.

    `by_sequence`: Liger's loss is (B, 1), so that its luspo, a mean over all entries, divides by B
    instead of B·T.
    """
    if loss_type == "luspo" and not by_sequence:
        return mask * mask.sum(-1, keepdim=True) / mask.numel()
    average, num_tokens = AVERAGES[loss_type], None
    if average == "dapo":
        num_tokens = _tokens_per_process(mask, num_items_in_batch)
    cu_seqlens = mask.shape[1] * torch.arange(len(mask) + 1, device=mask.device)
    weights = token_weights(
        cu_seqlens,
        average,
        num_tokens=num_tokens,
        max_completion_length=max_completion_length,
        mask=mask.flatten(),
    )
    return weights.view_as(mask)


def _tokens_per_process(mask: Tensor, num_items_in_batch: int | Tensor | None) -> Tensor:
    """The divisor () of dapo and cispo: tokens of all processes per process, at least 1."""
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if num_items_in_batch is None:
        tokens = mask.sum()
        if distributed:
            torch.distributed.all_reduce(tokens)
    else:
        tokens = torch.as_tensor(num_items_in_batch, dtype=torch.float32, device=mask.device)
    return (tokens / (torch.distributed.get_world_size() if distributed else 1)).clamp(min=1)


def _clipped(
    ours: Tensor, logp: Tensor, advantages: Tensor, weights: Tensor, options: dict
) -> Tensor:
    """Which tokens (N,) Liger counts as clipped: unlike `ours`, not those that `delta` bounds."""
    if options["delta"] is None:
        return ours
    without_delta = options | {"delta": None}
    _, _, clipped, _ = policy_loss_ref(logp, advantages, weights, beta=0.0, **without_delta)
    return clipped


def _means(mask: Tensor, kl: Tensor | None, clipped: Tensor) -> list[Tensor]:
    """Liger's metrics: the means over unmasked tokens of the KL, if there is one, and `clipped`."""
    total = mask.sum().clamp(min=1)
    return [value.sum() / total for value in (kl, clipped) if value is not None]


def _has_kl(beta: float | Tensor) -> bool:
    """Whether the loss has a KL term: always for a tensor, whose comparison would synchronise."""
    return isinstance(beta, Tensor) or beta != 0


def _liger(module: str, name: str):
    """Liger's own function or class, for vespo, which this package lacks; gives one warning."""
    try:
        own = getattr(import_module(f"liger_kernel.{module}"), name)
    except ImportError as error:
        raise ImportError(
            "loss_type 'vespo' needs Liger-Kernel itself: pip install liger-kernel, or choose "
            "another loss_type"
        ) from error
    warn_once("mr1_fast does not implement loss_type 'vespo': Liger-Kernel itself computes it")
    return own
