"""TRL's GRPOTrainer with the loss of this package, β(s) for it, and TRL's functions on logits.

    from mr1_fast.integrations.trl import DynamicKLCallback, FusedGRPOTrainer

TRL's trainer scores completions in two steps: log-probabilities of the tokens, then the loss as a
function of them, so the backward has to make every logit again. `FusedGRPOTrainer` knows the loss
while it has the logits: three matrix products with the LM head instead of four, one buffer for
logits instead of two, and no second read of them.
"""

import functools
import inspect
from types import SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import GRPOTrainer

from ..loss import GRPOLoss, linear_grpo_loss, policy_loss_ref, token_weights
from ..model.families import base_model
from . import check_version, warn_once
from .head import HeadError
from .loss_options import AVERAGES, loss_options, per_token, rows_with_loss
from .trl_functions import (
    ChunkedLogProbFunction,
    entropy_from_logits,
    selective_log_softmax,
    selective_log_softmax_and_entropy,
)

check_version("trl")
try:
    from .trl_head import add_label_head, in_one_dtype, padded, predicting
    from .trl_kl import DynamicKLCallback
except ImportError as error:
    raise ImportError(
        "mr1_fast.integrations.trl needs TRL 1.16 or later: pip install 'trl>=1.16'"
    ) from error

__all__ = [
    "ChunkedLogProbFunction",
    "DynamicKLCallback",
    "FusedGRPOTrainer",
    "entropy_from_logits",
    "selective_log_softmax",
    "selective_log_softmax_and_entropy",
]


class FusedGRPOTrainer(GRPOTrainer):
    """TRL's GRPOTrainer, for text and vision, with a loss that takes less time and memory.

    Arguments, objective and metrics are TRL's. What the fused loss cannot express runs TRL's own
    code, with one warning that says why: loss_type "vespo", an entropy bonus, top_entropy_quantile
    < 1, off_policy_mask_threshold, fp16 with a gradient scaler, models with a router loss, with
    transformed logits or spread by device_map, prompt learning, ZeRO-3. `fused` says which code
    runs.

    For every batch, the gradient of TRL's own formula by the log-probabilities is compared with
    ours; should they differ, TRL's code takes over.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._scored: tuple | None = None
        self._disagrees: str | None = None
        self._no_head = self._why_no_head()
        for model in (self.model, self.ref_model):
            if model is not None:
                self.fuse_head(model)

    @property
    def fused(self) -> bool:
        """Whether this package computes the next loss, rather than TRL."""
        return self._why_not_fused() is None

    def fuse_head(self, model: nn.Module) -> None:
        """Let `model`, the policy or a reference, compute our log-probs and loss in its LM head.

        All processes do, or none: where only the first one holds weights yet, it alone can tell
        whether its logits are those of the head.
        """
        if self._no_head is not None:
            return
        plain, reason = _unwrapped(model, self.accelerator), None
        before = vars(plain).get("forward")
        try:
            add_label_head(plain, self.temperature, self.args.cast_lm_head_to_fp32)
        except HeadError as error:
            reason = str(error)
        refused = torch.tensor(float(reason is not None), device=self.accelerator.device)
        if self.accelerator.reduce(refused, "sum").item() > 0:
            self._no_head = reason or "the LM head was refused in another process"
            vars(plain).pop("forward", None)
            if before is not None:
                plain.forward = before

    def _why_no_head(self) -> str | None:
        """Why nothing can be fused into the model's LM head, apart from what `add_head` refuses."""
        if getattr(getattr(self.model, "active_peft_config", None), "is_prompt_learning", False):
            return "prompt learning adds positions of its own"
        if self.aux_loss_enabled:
            return "the model has a router loss"
        if len(set(getattr(self.model, "hf_device_map", {}).values())) > 1:
            return "device_map spreads the model over devices"
        return "ZeRO-3 shards the LM head" if is_deepspeed_zero3_enabled() else None

    def _why_not_fused(self) -> str | None:
        """Why TRL's code computes the next loss; None if this package does."""
        if self._no_head or self._disagrees:
            return self._no_head or self._disagrees
        level = self.importance_sampling_level
        scoring = type(self)._get_per_token_logps_and_entropies
        own_scoring = FusedGRPOTrainer._get_per_token_logps_and_entropies
        reasons = {
            f"loss_type {self.loss_type!r} is not among {', '.join(AVERAGES)}": (
                self.loss_type not in AVERAGES
            ),
            f"importance_sampling_level is {level!r}": level not in ("token", "sequence"),
            "an entropy bonus is part of the loss": self._entropy_bonus_enabled,
            "top_entropy_quantile chooses tokens by their entropy": self.top_entropy_quantile < 1,
            "off_policy_mask_threshold is set": self.off_policy_mask_threshold is not None,
            # Our gradients exist before the loss is scaled, and would underflow.
            "fp16 scales the loss before its backward": self.accelerator.scaler is not None,
            "a subclass scores tokens itself": scoring is not own_scoring,
            "a parent class computes the loss itself": not self._extends_trls("_compute_loss"),
            "a parent class scores tokens itself": not self._extends_trls(
                "_get_per_token_logps_and_entropies"
            ),
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    def _extends_trls(self, method: str) -> bool:
        """Whether it is TRL's method that ours extends, not one of a class that stands between.

        Ours knows what TRL's computes from log-probs, and would leave out what else one adds.
        """
        return getattr(super(), method).__func__ is getattr(GRPOTrainer, method)

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        return self._scored or super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _compute_loss(self, model, inputs):
        if reason := self._why_not_fused():
            warn_once(f"FusedGRPOTrainer runs TRL's own loss: {reason}")
            return super()._compute_loss(model, inputs)
        arguments = self._loss_arguments(inputs)
        result, logp, entropy = self._score(model, inputs, arguments)

        # TRL's formula on our log-probabilities: for its metrics, and for the gradient to compare
        # with.
        logp = logp.detach().requires_grad_(torch.is_grad_enabled())
        self._scored = (logp, entropy, None)
        try:
            value = super()._compute_loss(model, inputs)
        finally:
            self._scored = None
        if logp.requires_grad and not self._agrees(arguments, logp, value):
            return super()._compute_loss(model, inputs)
        return result.loss

    def _score(
        self, model, inputs: dict, arguments: "_LossArguments"
    ) -> tuple[GRPOLoss, Tensor, Tensor]:
        """The loss of a batch, and the log-probs and entropy (B, T) of its completions."""
        shape = inputs["completion_ids"].shape
        results: list[GRPOLoss] = []

        def score(labels, fused_lm_head, **model_inputs):
            head = functools.partial(self._loss, arguments, shape[1])
            results.append(model(**model_inputs, head=head))
            # A tool's tokens have no log-prob here: with the old one, their ratio is 1.
            old = inputs.get("old_per_token_logps")
            return SimpleNamespace(
                log_probs=padded(results[0].logp, arguments.rows, shape, old),
                entropy=padded(results[0].entropy, arguments.rows, shape),
            )

        # TRL's own method prepares the inputs of the model, including its images.
        ids, attended = (
            torch.cat([inputs[f"prompt_{name}"], inputs[f"completion_{name}"]], 1)
            for name in ("ids", "mask")
        )
        images = {name: inputs[name] for name in _image_arguments() if name in inputs}
        logp, entropy, _ = self._get_per_token_logps_and_entropies(
            score, ids, attended, shape[1], compute_entropy=True, **images
        )
        return results[0], logp, entropy

    def _agrees(self, arguments: "_LossArguments", logp: Tensor, value: Tensor) -> bool:
        """Whether `value`, TRL's loss as a function of logp (B, T), has the gradient of ours."""
        (theirs,) = torch.autograd.grad(value, logp)
        ours, limited = arguments.gradient(logp.detach())
        # Where TRL's KL overflows, or ours is at its bound, they differ on purpose.
        comparable = theirs.isfinite() & ~limited
        ours, theirs = (torch.where(comparable, each, 0.0) for each in (ours, theirs))
        off = (ours - theirs).norm() > 1e-3 * theirs.norm()

        # All processes must take the same way.
        if self.accelerator.reduce(off.float(), "sum").item() == 0:
            return True
        self._disagrees = (
            f"this TRL computes something else than ours for loss_type {self.loss_type!r}"
        )
        warn_once(f"FusedGRPOTrainer runs TRL's own loss: {self._disagrees}")
        return False

    def _loss_arguments(self, inputs: dict) -> "_LossArguments":
        """Translate a batch and the trainer's settings into arguments of `linear_grpo_loss`."""
        mask = inputs["completion_mask"] != 0
        if "tool_mask" in inputs:
            mask = mask & (inputs["tool_mask"] != 0)
        rows, cu_seqlens = rows_with_loss(mask)  # the only place that waits for a GPU

        def by_row(name: str) -> Tensor:
            return per_token(name, inputs[name], mask).flatten()[rows]

        off_policy = inputs.get("old_per_token_logps") is not None
        bias_corrected_kl = self.beta != 0 and self.args.use_bias_correction_kl
        corrects_sampling = self.use_vllm and self.vllm_importance_sampling_correction
        options = loss_options(
            self.loss_type,
            level=self._ratio_level(inputs, corrects_sampling, bias_corrected_kl),
            epsilon_low=self.epsilon_low,
            epsilon_high=self.epsilon_high,
            delta=self.args.delta,
            sapo_temperatures=(self.args.sapo_temperature_pos, self.args.sapo_temperature_neg),
            bias_corrected_kl=bias_corrected_kl,
        )
        options |= {
            "beta": self.beta,
            "old_logp": by_row("old_per_token_logps") if off_policy else None,
            "ref_logp": by_row("ref_per_token_logps") if self.beta != 0 else None,
            "is_weights": by_row("importance_sampling_ratio") if corrects_sampling else None,
            "cu_seqlens": cu_seqlens,
        }
        return _LossArguments(
            rows=rows,
            targets=by_row("completion_ids"),
            advantages=by_row("advantages"),
            token_weights=self._token_weights(inputs, rows, cu_seqlens),
            options=options,
        )

    def _ratio_level(self, inputs: dict, corrects_sampling: bool, bias_corrected_kl: bool) -> str:
        """Whether our loss takes ratios per "token" or per "sequence".

        On policy every ratio is 1, and the sum over a sequence has the same gradient either way.
        Ratios per token cost one pass less, so they replace those per sequence where nothing else
        differs between the tokens of a sequence.
        """
        on_policy = inputs.get("old_per_token_logps") is None
        per_sequence = inputs["advantages"].ndim == 1
        if corrects_sampling:
            per_sequence &= inputs["importance_sampling_ratio"].shape[-1] == 1
        if on_policy and per_sequence and not bias_corrected_kl:
            return "token"
        return self.importance_sampling_level

    def _token_weights(self, inputs: dict, rows: Tensor, cu_seqlens: Tensor) -> Tensor:
        """The weight (N,) of each token in the average that the trainer's loss_type names."""
        training, average = self.model.training, AVERAGES[self.loss_type]
        steps = self.current_gradient_accumulation_steps if training else 1
        counts = {"accumulation_steps": steps, "max_completion_length": self.max_completion_length}
        if average == "dapo":
            tokens = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
            if training:
                tokens = tokens * steps / self.args.steps_per_generation
            counts = {"num_tokens": tokens}
        mask = torch.ones_like(rows, dtype=torch.bool)
        return token_weights(cu_seqlens, average, mask=mask, **counts)

    def _loss(
        self,
        arguments: "_LossArguments",
        length: int,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> GRPOLoss:
        """The loss of a batch, from hidden states of prompts and completions; a HeadFunction."""
        hidden = predicting(hidden, arguments.rows, length)
        fp32 = self.args.cast_lm_head_to_fp32
        with in_one_dtype(hidden, weight, bias, fp32) as (hidden, weight, bias):
            return linear_grpo_loss(
                hidden,
                weight,
                arguments.targets,
                arguments.advantages,
                arguments.token_weights,
                bias=bias,
                temperature=self.temperature,
                **arguments.options,
            )


class _LossArguments(NamedTuple):
    """The arguments of `linear_grpo_loss` for one batch, apart from hidden states and LM head.

    N is the number of tokens that carry loss; values are per token, (N,).
    """

    rows: Tensor
    """Flat positions of the tokens in (B, T)."""
    targets: Tensor
    advantages: Tensor
    token_weights: Tensor
    options: dict
    """Keyword arguments."""

    def gradient(self, logp: Tensor) -> tuple[Tensor, Tensor]:
        """The gradient of the loss by logp (B, T), and where the KL is at its bound, (B, T)."""
        packed = logp.flatten()[self.rows].requires_grad_()
        loss, _, _, limited = policy_loss_ref(
            packed, self.advantages, self.token_weights, **self.options
        )
        (gradient,) = torch.autograd.grad(loss.sum(), packed)
        return tuple(padded(each, self.rows, logp.shape) for each in (gradient, limited))


def _unwrapped(model: nn.Module, accelerator) -> nn.Module:
    """The transformers model without the wrappers of accelerate, torch.compile and PEFT."""
    return base_model(accelerator.unwrap_model(model, keep_torch_compile=False))


@functools.cache
def _image_arguments() -> tuple[str, ...]:
    """Names of the vision inputs that TRL's scoring method accepts."""
    names = list(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)
    return tuple(names[names.index("compute_aux_loss") + 1 :])
