"""GRPOTrainer of TRL with the loss of this package, and β(s) for it.

    from mr1_fast.integrations.trl import DynamicKLCallback, FusedGRPOTrainer

TRL's trainer scores completions in two steps: log-probabilities of the tokens, then the loss as a function of them,
so that the backward has to make every logit again. `FusedGRPOTrainer` knows the loss while it has the logits: three
matrix products with the LM head instead of four, one buffer instead of two, no second read.
"""

import contextlib
import copy
import functools
import inspect
import sys
from types import MethodType, SimpleNamespace

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.integrations import is_deepspeed_zero3_enabled
from transformers.utils import is_peft_available
from trl import GRPOTrainer

from mr1_fast.kl_schedule import DynamicKL
from mr1_fast.loss import GRPOLoss, linear_grpo_loss, linear_token_logprobs, token_weights

from . import check_version, warn_once
from .head import HeadFunction, add_head
from .trl_functions import (
    ChunkedLogProbFunction,
    entropy_from_logits,
    selective_log_softmax,
    selective_log_softmax_and_entropy,
)

check_version("trl")
try:
    from trl.trainer.utils import FusedCausalLMOutput, add_fused_lm_head
except ImportError as error:
    raise ImportError("mr1_fast.integrations.trl needs TRL ≥ 1.15: pip install 'trl>=1.15'") from error

__all__ = [
    "ChunkedLogProbFunction",
    "DynamicKLCallback",
    "FusedGRPOTrainer",
    "entropy_from_logits",
    "selective_log_softmax",
    "selective_log_softmax_and_entropy",
]

AVERAGES = {
    "grpo": "grpo",
    "sapo": "grpo",
    "bnpo": "bnpo",
    "dr_grpo": "dr_grpo",
    "dapo": "dapo",
    "cispo": "dapo",
    "luspo": "luspo",
}
"""TRL's loss_type → the average of `token_weights` that it takes."""


class FusedGRPOTrainer(GRPOTrainer):
    """TRL's GRPOTrainer, text and vision: same arguments, objective and metrics, less time and memory in the loss.

    What the fused loss cannot express runs TRL's own code, with one warning that says why: loss_type "vespo", an
    entropy bonus, top_entropy_quantile < 1, off_policy_mask_threshold, models with a router loss, with transformed
    logits, or with an adapter in the LM head, prompt learning, ZeRO-3. `fused` says which it is. At the first loss,
    and whenever the loss_type changes, TRL's own formula must give the same value, or its code takes over.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._scored = None
        self._checked: tuple | None = None
        self._disagrees: str | None = None
        self._no_head = self._why_no_head()
        try:
            for model in filter(None, (self.model, self.ref_model) if self._no_head is None else ()):
                self._add_head(model)
        except TypeError as error:
            self._no_head = str(error)

    @property
    def fused(self) -> bool:
        """Whether the next loss is ours."""
        return self._why_not_fused() is None

    def _add_head(self, model: nn.Module) -> None:
        """Fused log-probs for reference, old policy and other losses; and the way in for ours."""
        _add_label_head(_unwrapped(model, self.accelerator), self.temperature, self.args.cast_lm_head_to_fp32)

    def _why_no_head(self) -> str | None:
        """What keeps the model's LM head from being fused with anything of ours, beside what `add_head` refuses."""
        if getattr(getattr(self.model, "active_peft_config", None), "is_prompt_learning", False):
            return "prompt learning adds positions of its own"
        if self.aux_loss_enabled:
            return "the model has a router loss"
        return "ZeRO-3 shards the LM head" if is_deepspeed_zero3_enabled() else None

    def _why_not_fused(self) -> str | None:
        """What keeps the next loss from being ours."""
        if self._no_head or self._disagrees:
            return self._no_head or self._disagrees
        if self.loss_type not in AVERAGES:
            return f"loss_type {self.loss_type!r} is not among {', '.join(AVERAGES)}"
        if self.importance_sampling_level not in ("token", "sequence"):
            return f"importance_sampling_level {self.importance_sampling_level!r} is not token or sequence"
        if self._entropy_bonus_enabled:
            return "an entropy bonus is part of the loss"
        if self.top_entropy_quantile < 1:
            return "top_entropy_quantile chooses tokens by their entropy"
        return "off_policy_mask_threshold is set" if self.off_policy_mask_threshold is not None else None

    def _get_per_token_logps_and_entropies(self, *args, **kwargs):
        return self._scored or super()._get_per_token_logps_and_entropies(*args, **kwargs)

    def _compute_loss(self, model, inputs):
        if reason := self._why_not_fused():
            warn_once(f"FusedGRPOTrainer runs TRL's own loss: {reason}")
            return super()._compute_loss(model, inputs)
        mask = inputs["completion_mask"].bool()
        if "tool_mask" in inputs:
            mask = mask & inputs["tool_mask"].bool()
        head, scale = self._loss_head(inputs, mask)
        results: list[GRPOLoss] = []

        def score(labels, fused_lm_head, **model_inputs):
            results.append(model(**model_inputs, head=head))
            padded = (_padded(each, mask) for each in (results[-1].logp, results[-1].entropy))
            return SimpleNamespace(**dict(zip(("log_probs", "entropy"), padded, strict=True)))

        # TRL's own method prepares the inputs of the model, with its images.
        ids, attended = (
            torch.cat([inputs[f"prompt_{name}"], inputs[f"completion_{name}"]], 1) for name in ("ids", "mask")
        )
        images = {name: inputs[name] for name in _image_arguments() if name in inputs}
        self._scored = self._get_per_token_logps_and_entropies(
            score, ids, attended, mask.shape[1], compute_entropy=True, **images
        )
        try:
            with torch.no_grad():  # from our log-probabilities: its metrics, and the value that ours must have
                value = super()._compute_loss(model, inputs)
        finally:
            self._scored = None
        loss = results[0].loss
        if not self._agrees(loss.detach(), value, scale):
            return super()._compute_loss(model, inputs)
        return loss

    def _agrees(self, ours: Tensor, theirs: Tensor, scale: Tensor) -> bool:
        """Whether both are one objective; looked at once for each, as reading them synchronises."""
        case = (self.loss_type, self.importance_sampling_level)
        if self._checked == case:
            return True
        self._checked = case
        # Where TRL's KL overflows, its value is inf and says nothing.
        off = ((ours - theirs).abs() > 1e-3 * (scale + theirs.abs())) & theirs.isfinite()
        same = self.accelerator.reduce(off.float(), "sum").item() == 0  # every process goes the same way
        if not same:
            self._disagrees = f"its loss is {theirs:.6g} where ours is {ours:.6g}, so this TRL computes something else"
            warn_once(f"FusedGRPOTrainer runs TRL's own loss: {self._disagrees}")
        return same

    def _loss_head(self, inputs: dict, mask: Tensor) -> tuple[HeadFunction, Tensor]:
        """The function of hidden states and LM head that is the loss of `inputs`, and the size of its terms."""
        training = self.model.training
        cu_seqlens = nn.functional.pad(mask.sum(1).cumsum(0), (1, 0))
        targets = inputs["completion_ids"][mask]

        def by_token(value: Tensor | None) -> Tensor | None:
            if value is None:
                return None
            return (value.unsqueeze(1) if value.ndim == 1 else value).expand(mask.shape)[mask]

        steps = self.current_gradient_accumulation_steps if training else 1
        average = {"accumulation_steps": steps, "max_completion_length": self.max_completion_length}
        if AVERAGES[self.loss_type] == "dapo":
            tokens = inputs["num_items_in_batch"].clamp(min=1) / self.accelerator.num_processes
            average = {"num_tokens": tokens * steps / self.args.steps_per_generation if training else tokens}
        all_rows = torch.ones_like(targets, dtype=torch.bool)
        weights = token_weights(cu_seqlens, AVERAGES[self.loss_type], mask=all_rows, **average)
        surrogate = self.loss_type if self.loss_type in ("cispo", "sapo") else "clip"
        corrected = self.use_vllm and self.vllm_importance_sampling_correction
        advantages = by_token(inputs["advantages"])
        objective = {
            "beta": self.beta,
            "old_logp": by_token(inputs.get("old_per_token_logps")),
            "ref_logp": by_token(inputs["ref_per_token_logps"]) if self.beta != 0 else None,
            "clip_low": self.epsilon_low,
            "clip_high": self.epsilon_high - 1 if surrogate == "cispo" else self.epsilon_high,  # TRL's is the cap
            "delta": self.args.delta if surrogate == "clip" else None,
            "surrogate": surrogate,
            "sapo_temperatures": (self.args.sapo_temperature_pos, self.args.sapo_temperature_neg),
            "ratio_level": self.importance_sampling_level,
            "cu_seqlens": cu_seqlens,
            "is_weights": by_token(inputs["importance_sampling_ratio"]) if corrected else None,
            "bias_corrected_kl": self.args.use_bias_correction_kl,
        }

        def head(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> GRPOLoss:
            # The position before a token predicts it; prompt and padding never reach the LM head.
            rows = hidden[:, -mask.shape[1] - 1 : -1][mask]
            with _precision(rows, self.args.cast_lm_head_to_fp32) as rows:
                options = objective | {"bias": bias, "temperature": self.temperature}
                return linear_grpo_loss(rows, weight, targets, advantages, weights, **options)

        return head, (weights * advantages.abs()).sum()


class DynamicKLCallback(TrainerCallback):
    """β(s) of OThink-MR1 (arXiv 2503.16081) for TRL's GRPOTrainer, fused or not: see `mr1_fast.DynamicKL`.

        trainer.add_callback(DynamicKLCallback(trainer, beta_min=0.04, beta_max=0.1))

    s counts optimizer steps, from where a resumed run goes on; the total is the run's. β is logged as "beta". A trainer
    that was made with β = 0, TRL's default, has no reference: it gets one here, so make this callback before training.
    Raises ValueError where that is impossible (FSDP, DeepSpeed, a model spread by device_map).
    """

    def __init__(self, trainer: GRPOTrainer, beta_min: float, beta_max: float, explore_fraction: float = 0.3):
        self.trainer, self.settings = trainer, (beta_min, beta_max)
        self.explore_fraction = explore_fraction
        self._schedule(1)  # refuses bad numbers now
        if trainer.beta == 0 and beta_max > 0:
            _add_reference(trainer)
        self._set(0, 1)

    def _schedule(self, total_steps: int) -> DynamicKL:
        return DynamicKL(*self.settings, total_steps, self.explore_fraction)

    def _set(self, step: int, total_steps: int) -> None:
        beta = self._schedule(total_steps)(step)
        # At an exact 0, TRL would compute no reference for a batch that later steps use again. In fp32 this is 0.
        self.trainer.beta = max(beta, sys.float_info.min) if self.settings[1] > 0 else beta

    def on_step_begin(self, args, state, control, **kwargs):
        """Set the β of the coming optimizer step."""
        self._set(state.global_step, state.max_steps)
        self.trainer._metrics["train"]["beta"].append(self.trainer.beta)


def _unwrapped(model: nn.Module, accelerator) -> nn.Module:
    """The transformers model without accelerate's and PEFT's wrappers."""
    model = accelerator.unwrap_model(model)
    return model.get_base_model() if hasattr(model, "peft_config") else model


def _add_reference(trainer: GRPOTrainer) -> None:
    """Give a trainer that was made with β = 0 what TRL makes for another β: the model as it is now."""
    model = trainer.model
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled or hasattr(model, "hf_device_map"):
        raise ValueError(
            "beta is 0, and a sharded model cannot be copied: give GRPOConfig a beta above 0 to start with"
        )
    if is_peft_available() and hasattr(model, "peft_config"):
        if "ref" not in model.peft_config:
            _copy_adapter(model)
        return
    reference = copy.deepcopy(model).requires_grad_(False).eval()
    for module in (reference, reference.get_output_embeddings()):
        vars(module).pop("forward", None)  # TRL's and ours, which still belong to the policy
    add_fused_lm_head(reference, trainer.temperature, trainer.args.cast_lm_head_to_fp32)
    trainer.ref_model = trainer.accelerator.prepare_model(reference, evaluation_mode=True)
    if isinstance(trainer, FusedGRPOTrainer) and trainer._no_head is None:
        trainer._add_head(trainer.ref_model)


def _copy_adapter(model: nn.Module) -> None:
    """An adapter "ref", which TRL's trainer takes for the reference, with the weights that "default" has now."""
    model.add_adapter("ref", model.peft_config["default"])
    for name, parameter in model.named_parameters():
        if ".default." in name:
            reference = model.get_parameter(name.replace(".default.", ".ref."))
            reference.data.copy_(parameter.data)
            reference.requires_grad_(False)


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
    def forward(self, *args, fused_lm_head: bool = False, labels: Tensor | None = None, head=None, **kwargs):
        if head is not None:
            return with_head(*args, head=head, **kwargs)
        if not fused_lm_head:
            return with_head(*args, **kwargs | ({} if labels is None else {"labels": labels}))

        def label_logprobs(hidden: Tensor, weight: Tensor, bias: Tensor | None) -> FusedCausalLMOutput:
            mask = labels[:, 1:] != -100
            with _precision(hidden[:, :-1][mask], fp32) as rows:
                logp, entropy = linear_token_logprobs(rows, weight, labels[:, 1:][mask], temperature, bias)
            return FusedCausalLMOutput(log_probs=_padded(logp, mask), entropy=_padded(entropy, mask), label_mask=mask)

        return with_head(*args, head=label_logprobs, **kwargs)

    model.forward = MethodType(forward, model)


def _padded(values: Tensor, mask: Tensor) -> Tensor:
    """Values (N,) at the N places of mask (B, T), 0 elsewhere."""
    return values.new_zeros(mask.shape).masked_scatter(mask, values)


@contextlib.contextmanager
def _precision(rows: Tensor, fp32: bool):
    """The rows as the LM head takes them: in fp32 and outside of autocast, where TRL has cast the head so."""
    with torch.autocast(rows.device.type, enabled=False) if fp32 else contextlib.nullcontext():
        yield rows.float() if fp32 else rows
