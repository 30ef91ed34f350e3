"""GRPOTrainer of TRL with the loss of this package, and β(s) for it.

    from mr1_fast.integrations.trl import DynamicKLCallback, FusedGRPOTrainer

TRL's trainer scores completions in two steps: log-probabilities of the tokens, then the loss as a function of them,
so that the backward has to make every logit again. `FusedGRPOTrainer` knows the loss while it has the logits: three
matrix products with the LM head instead of four, one buffer instead of two, no second read.
"""

import contextlib
import functools
import inspect
from types import MethodType, SimpleNamespace
from typing import NamedTuple

import torch
from torch import Tensor, nn
from transformers.integrations import is_deepspeed_zero3_enabled
from trl import GRPOTrainer

from mr1_fast.loss import (
    GRPOLoss,
    linear_grpo_loss,
    linear_token_logprobs,
    policy_loss_ref,
    token_weights,
)
from mr1_fast.model.forward import base_model

from . import check_version, warn_once
from .head import HeadError, add_head, in_dtype_of
from .objective import AVERAGES, objective_options, packed_rows, per_token
from .trl_functions import (
    ChunkedLogProbFunction,
    entropy_from_logits,
    selective_log_softmax,
    selective_log_softmax_and_entropy,
)

check_version("trl")
try:
    from trl.trainer.utils import FusedCausalLMOutput

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
    """TRL's GRPOTrainer, text and vision: same arguments, objective and metrics, less time and memory in the loss.

    What the fused loss cannot express runs TRL's own code, with one warning that says why: loss_type "vespo", an
    entropy bonus, top_entropy_quantile < 1, off_policy_mask_threshold, fp16 with a gradient scaler, models with a
    router loss, with transformed logits, spread by device_map, prompt learning, ZeRO-3. `fused` says which it is. For
    every batch, the gradient of TRL's own formula by the log-probabilities must be ours, or its code takes over.
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
        """Whether the next loss is ours."""
        return self._why_not_fused() is None

    def fuse_head(self, model: nn.Module) -> None:
        """Give `model`, the policy or a reference, our log-probs, and the policy the way in for our loss."""
        if self._no_head is None:
            try:
                _add_label_head(
                    _unwrapped(model, self.accelerator),
                    self.temperature,
                    self.args.cast_lm_head_to_fp32,
                )
            except HeadError as error:
                self._no_head = str(error)

    def _why_no_head(self) -> str | None:
        """What keeps the model's LM head from being fused with anything of ours, beside what `add_head` refuses."""
        if getattr(getattr(self.model, "active_peft_config", None), "is_prompt_learning", False):
            return "prompt learning adds positions of its own"
        if self.aux_loss_enabled:
            return "the model has a router loss"
        if len(set(getattr(self.model, "hf_device_map", {}).values())) > 1:
            return "device_map spreads the model over devices"
        return "ZeRO-3 shards the LM head" if is_deepspeed_zero3_enabled() else None

    def _why_not_fused(self) -> str | None:
        """What keeps the next loss from being ours."""
        if self._no_head or self._disagrees:
            return self._no_head or self._disagrees
        scoring = type(self)._get_per_token_logps_and_entropies
        reasons = {
            f"loss_type {self.loss_type!r} is not among {', '.join(AVERAGES)}": self.loss_type
            not in AVERAGES,
            f"importance_sampling_level is {self.importance_sampling_level!r}": (
                self.importance_sampling_level not in ("token", "sequence")
            ),
            "an entropy bonus is part of the loss": self._entropy_bonus_enabled,
            "top_entropy_quantile chooses tokens by their entropy": self.top_entropy_quantile < 1,
            "off_policy_mask_threshold is set": self.off_policy_mask_threshold is not None,
            # Our gradients exist before the loss is scaled, and would underflow.
            "fp16 scales the loss before its backward": self.accelerator.scaler is not None,
            "a subclass scores tokens itself": scoring
            is not FusedGRPOTrainer._get_per_token_logps_and_entropies,
        }
        return next((reason for reason, holds in reasons.items() if holds), None)

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        return self._scored or super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _compute_loss(self, model, inputs):
        if reason := self._why_not_fused():
            warn_once(f"FusedGRPOTrainer runs TRL's own loss: {reason}")
            return super()._compute_loss(model, inputs)
        objective, shape = self._objective(inputs), inputs["completion_ids"].shape
        results: list[GRPOLoss] = []

        def score(labels, fused_lm_head, **model_inputs):
            results.append(
                model(**model_inputs, head=functools.partial(self._loss, objective, shape[1]))
            )
            # A tool's tokens have no log-prob here: with the old one, their ratio is 1.
            old = inputs.get("old_per_token_logps")
            log_probs = _padded(results[0].logp, objective.rows, shape, old)
            return SimpleNamespace(
                log_probs=log_probs, entropy=_padded(results[0].entropy, objective.rows, shape)
            )

        # TRL's own method prepares the inputs of the model, with its images.
        ids, attended = (
            torch.cat([inputs[f"prompt_{name}"], inputs[f"completion_{name}"]], 1)
            for name in ("ids", "mask")
        )
        images = {name: inputs[name] for name in _image_arguments() if name in inputs}
        logp, entropy, _ = self._get_per_token_logps_and_entropies(
            score, ids, attended, shape[1], compute_entropy=True, **images
        )
        # TRL's formula on our log-probabilities: its metrics, and the gradient that ours must have.
        logp = logp.detach().requires_grad_(torch.is_grad_enabled())
        self._scored = (logp, entropy, None)
        try:
            value = super()._compute_loss(model, inputs)
        finally:
            self._scored = None
        if logp.requires_grad and not self._agrees(objective, logp, value):
            return super()._compute_loss(model, inputs)
        return results[0].loss

    def _agrees(self, objective: "_Objective", logp: Tensor, value: Tensor) -> bool:
        """Whether `value`, TRL's loss as a function of logp (B, T), has the gradient of ours."""
        (theirs,) = torch.autograd.grad(value, logp)
        ours, limited = objective.gradient(logp.detach())
        # Where TRL's KL overflows, or ours is at its bound, they differ on purpose.
        known = theirs.isfinite() & ~limited
        ours, theirs = (torch.where(known, gradient, 0.0) for gradient in (ours, theirs))
        off = (ours - theirs).norm() > 1e-3 * theirs.norm()
        same = (
            self.accelerator.reduce(off.float(), "sum").item() == 0
        )  # every process goes the same way
        if not same:
            self._disagrees = (
                f"this TRL computes something else than ours for loss_type {self.loss_type!r}"
            )
            warn_once(f"FusedGRPOTrainer runs TRL's own loss: {self._disagrees}")
        return same

    def _objective(self, inputs: dict) -> "_Objective":
        """What the settings of the trainer make of a batch."""
        training = self.model.training
        mask = inputs["completion_mask"] != 0
        if "tool_mask" in inputs:
            mask = mask & (inputs["tool_mask"] != 0)
        rows, cu_seqlens = packed_rows(mask)  # the one place that waits for a GPU

        def by_row(name: str, value: Tensor | None) -> Tensor | None:
            return None if value is None else per_token(name, value, mask).flatten()[rows]

        steps = self.current_gradient_accumulation_steps if training else 1
        average = {"accumulation_steps": steps, "max_completion_length": self.max_completion_length}
        if AVERAGES[self.loss_type] == "dapo":
            tokens = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
            average = {
                "num_tokens": tokens * steps / self.args.steps_per_generation
                if training
                else tokens
            }
        weights = token_weights(
            cu_seqlens,
            AVERAGES[self.loss_type],
            mask=torch.ones_like(rows, dtype=torch.bool),
            **average,
        )
        advantages, old_logp = inputs["advantages"], inputs.get("old_per_token_logps")
        corrected = self.use_vllm and self.vllm_importance_sampling_correction
        is_weights = inputs["importance_sampling_ratio"] if corrected else None
        level, bias_corrected_kl = (
            self.importance_sampling_level,
            self.beta != 0 and self.args.use_bias_correction_kl,
        )
        per_sequence = advantages.ndim == 1 and (is_weights is None or is_weights.shape[-1] == 1)
        # On policy every ratio is 1, and the sum over a sequence has the same gradient either way: one pass will do.
        if old_logp is None and per_sequence and not bias_corrected_kl:
            level = "token"
        options = {
            "beta": self.beta,
            "old_logp": by_row("old_per_token_logps", old_logp),
            "ref_logp": by_row("ref_per_token_logps", inputs["ref_per_token_logps"])
            if self.beta != 0
            else None,
            "is_weights": by_row("importance_sampling_ratio", is_weights),
            "cu_seqlens": cu_seqlens,
        }
        sapo_temperatures = self.args.sapo_temperature_pos, self.args.sapo_temperature_neg
        options |= objective_options(
            self.loss_type, level, self.epsilon_low, self.epsilon_high, self.args.delta, sapo_temperatures,
            bias_corrected_kl,
        )  # fmt: skip
        targets, advantages = (
            by_row("completion_ids", inputs["completion_ids"]),
            by_row("advantages", advantages),
        )
        return _Objective(rows, targets, advantages, weights, options)

    def _loss(
        self,
        objective: "_Objective",
        length: int,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
    ) -> GRPOLoss:
        """The loss of a batch from the hidden states of its prompts and completions; what the model returns."""
        hidden = _predicting(hidden, objective.rows, length)
        with _aligned(hidden, weight, bias, self.args.cast_lm_head_to_fp32) as (
            hidden,
            weight,
            bias,
        ):
            return linear_grpo_loss(
                hidden, weight, objective.targets, objective.advantages, objective.token_weights,
                bias=bias, temperature=self.temperature, **objective.options,
            )  # fmt: skip


class _Objective(NamedTuple):
    """The loss of a batch: what `linear_grpo_loss` takes beside hidden states and LM head. Values are per row, (N,)."""

    rows: Tensor
    """Places of (B, T) that carry loss, counted row by row."""
    targets: Tensor
    advantages: Tensor
    token_weights: Tensor
    options: dict

    def gradient(self, logp: Tensor) -> tuple[Tensor, Tensor]:
        """By logp (B, T): the gradient of the loss, and where the KL is at its bound."""
        packed = logp.flatten()[self.rows].requires_grad_()
        loss, _, _, limited = policy_loss_ref(
            packed, self.advantages, self.token_weights, **self.options
        )
        (gradient,) = torch.autograd.grad(loss.sum(), packed)
        return tuple(_padded(each, self.rows, logp.shape) for each in (gradient, limited))


def _unwrapped(model: nn.Module, accelerator) -> nn.Module:
    """The transformers model without the wrappers of accelerate, torch.compile and PEFT."""
    return base_model(accelerator.unwrap_model(model, keep_torch_compile=False))


@functools.cache
def _image_arguments() -> tuple[str, ...]:
    """The inputs of a VLM that TRL's scoring method takes."""
    names = list(inspect.signature(GRPOTrainer._get_per_token_logps_and_entropies).parameters)
    return tuple(names[names.index("compute_aux_loss") + 1 :])


def _add_label_head(model: nn.Module, temperature: float, fp32: bool) -> None:
    """Answer TRL's `model(..., labels=labels, fused_lm_head=True)` with our log-probs; and take `head` (head.py)."""
    add_head(model)
    with_head = model.forward

    @functools.wraps(type(model).forward)  # generate() reads the signature
    def forward(
        self, *args, fused_lm_head: bool = False, labels: Tensor | None = None, head=None, **kwargs
    ):
        if head is not None:
            return with_head(*args, head=head, **kwargs)
        if not fused_lm_head:
            return with_head(*args, **kwargs | ({} if labels is None else {"labels": labels}))
        targets = labels[:, 1:]
        rows = (targets != -100).flatten().nonzero().squeeze(-1)

        def label_logprobs(
            hidden: Tensor, weight: Tensor, bias: Tensor | None
        ) -> FusedCausalLMOutput:
            hidden = _predicting(hidden, rows, targets.shape[1])
            with _aligned(hidden, weight, bias, fp32) as (hidden, weight, bias):
                logp, entropy = linear_token_logprobs(
                    hidden, weight, targets.flatten()[rows], temperature, bias
                )
            logp, entropy = (_padded(each, rows, targets.shape) for each in (logp, entropy))
            return FusedCausalLMOutput(log_probs=logp, entropy=entropy, label_mask=targets != -100)

        return with_head(*args, head=label_logprobs, **kwargs)

    model.forward = MethodType(forward, model)


def _predicting(hidden: Tensor, rows: Tensor, length: int) -> Tensor:
    """Of hidden (B, L, D), the states (N, D) that predict the tokens at `rows`, places among the last `length`."""
    before = hidden.shape[1] - length
    return hidden.flatten(0, 1).index_select(0, rows + rows // length * before + before - 1)


def _padded(
    values: Tensor, rows: Tensor, shape: torch.Size, others: Tensor | None = None
) -> Tensor:
    """Values (N,) at the places `rows` of (B, T), elsewhere `others` (B, T) or 0."""
    base = values.new_zeros(shape) if others is None else others.detach().to(values.dtype)
    return base.flatten().index_copy(0, rows, values).view(shape)


@contextlib.contextmanager
def _aligned(hidden: Tensor, weight: Tensor, bias: Tensor | None, fp32: bool):
    """Hidden states and LM head in the dtype of one; in fp32, outside of autocast, where TRL has cast the head so."""
    with torch.autocast(hidden.device.type, enabled=False) if fp32 else contextlib.nullcontext():
        hidden = hidden.float() if fp32 else hidden
        yield hidden, *in_dtype_of(hidden, weight, bias)
