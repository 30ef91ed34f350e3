"""Liger-Kernel's GRPO functions on this package's kernels: migrating takes a change of import.

    from mr1_fast.integrations.liger import LigerFusedLinearGRPOLoss, triton_grpo_loss

Arguments, defaults and return values are those of liger-kernel 0.8.5. Losses, metrics and gradients
equal Liger's up to rounding. Liger itself is needed only for loss_type "vespo", which is passed on
to it. The differences:

- KL: the log-ratio inside k3 is bounded at ±20. Liger's exponential overflows, and NaN reaches the
  weights.
- luspo on hidden states: Liger's loss includes the padding, with gradients. Here padding
  contributes nothing, and the other tokens have Liger's weights. (Per sequence, a ratio
  `vllm_is_ratio` (B, T) counts at all T positions, as in Liger.)
- luspo on logits with reduce=True: Liger's backward gives tokens the lengths of other sequences and
  reads past the last one. Here the gradient is that of the loss.
- `advantages` may be per token, (B, T). β and temperature may be 0-d tensors, and no new value of
  any setting compiles anything.

Masks hold 0 and 1. Letters: B sequences of T (or L) tokens, D hidden size, V vocabulary size.
"""

import warnings
from inspect import signature

import torch
from torch import Tensor, nn

from ..loss import linear_grpo_loss, linear_token_logprobs
from . import check_version
from .head import in_dtype_of
from .liger_logits import fused_selective_log_softmax, triton_grpo_loss
from .liger_options import (
    averaging_weights,
    check_positive,
    checked_options,
    clipped_as_liger,
    has_kl,
    masked_means,
    of_liger,
)
from .loss_options import per_token, rows_with_loss

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
        check_positive(
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
            return of_liger("chunked_loss", "LigerFusedLinearGRPOLoss")(**settings)(**inputs)
        shapes = _input.shape[:-1], selected_token_ids.shape
        if any(shape != attention_mask.shape for shape in shapes):
            raise ValueError(
                f"_input, selected_token_ids and attention_mask have shapes {tuple(_input.shape)}, "
                f"{tuple(selected_token_ids.shape)} and {tuple(attention_mask.shape)}: expected "
                "(B, T, D) and (B, T)"
            )
        options = checked_options(
            self.loss_type, self.importance_sampling_level, self.epsilon_low, self.epsilon_high,
            self.delta, self.sapo_temperature_pos, self.sapo_temperature_neg,
            self.use_bias_correction_kl,
        )  # fmt: skip
        mask = attention_mask.float()
        rows, cu_seqlens = rows_with_loss(mask)

        def packed(name: str, value: Tensor | None) -> Tensor | None:
            return None if value is None else per_token(name, value, mask).flatten()[rows]

        targets = selected_token_ids.flatten()[rows].long()
        with_kl, ref_logp = has_kl(self.beta), None
        if self.use_ref_model and ref_per_token_logps is not None and ref_input is not None:
            warnings.warn(
                "Both ref_per_token_logps and ref_input are provided. Using ref_per_token_logps.",
                stacklevel=2,
            )
        if with_kl and self.use_ref_model:
            ref_logp = packed("ref_per_token_logps", ref_per_token_logps)
            if ref_logp is None:
                ref_logp = self._reference(ref_input, ref_weight, ref_bias, rows, targets)
        if (self.loss_type, self.importance_sampling_level) == ("luspo", "sequence"):
            vllm_is_ratio = _summed_over_padding(vllm_is_ratio, mask)
        options |= {
            "old_logp": packed("old_per_token_logps", old_per_token_logps),
            "is_weights": packed("vllm_is_ratio", vllm_is_ratio),
            "cu_seqlens": cu_seqlens,
        }
        weights = averaging_weights(
            mask, self.loss_type, self.max_completion_length, num_items_in_batch
        ).flatten()[rows]
        advantages = packed("advantages", advantages)
        hidden = _input.flatten(0, 1)[rows]
        lin_weight, bias = in_dtype_of(hidden, lin_weight, bias)
        result = linear_grpo_loss(
            hidden, lin_weight, targets, advantages, weights, bias=bias, ref_logp=ref_logp,
            beta=0.0 if ref_logp is None else self.beta, temperature=self.temperature, **options,
        )  # fmt: skip
        clipped = clipped_as_liger(result.clipped, result.logp, advantages, weights, options)
        return result.loss, tuple(masked_means(mask, result.kl if with_kl else None, clipped))

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


def _summed_over_padding(ratio: Tensor | None, mask: Tensor) -> Tensor:
    """The factor (B, 1) of each token's policy term that makes luspo per sequence Liger's.

    Liger adds up a sequence's policy term, which is one number times the ratio, over all T
    positions, padding included; its KL is added up over tokens. Here only the tokens of `mask`
    (B, T) have a loss.
    """
    ratio = torch.ones_like(mask) if ratio is None else per_token("vllm_is_ratio", ratio, mask)
    return ratio.float().sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
