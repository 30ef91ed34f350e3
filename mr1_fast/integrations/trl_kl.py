"""β(s) of OThink-MR1 for TRL's GRPOTrainer."""

import copy
import sys

from torch import nn
from transformers import TrainerCallback
from transformers.utils import is_peft_available
from trl import GRPOTrainer
from trl.trainer.utils import add_fused_lm_head

from ..kl_schedule import DynamicKL


class DynamicKLCallback(TrainerCallback):
    """Set the β of TRL's GRPOTrainer, fused or not, at each optimizer step by `mr1_fast.DynamicKL`.

        trainer.add_callback(DynamicKLCallback(trainer, beta_min=0.04, beta_max=0.1))

    β(s) is that of OThink-MR1 (arXiv 2503.16081): s counts the optimizer steps of the run, also
    after resuming. β is logged as "beta". A trainer that was made with β = 0, TRL's default, has no
    reference model and gets one here, a copy of the policy as it is now: make this callback before
    training. Raises ValueError for bad numbers, and if the model cannot be copied (FSDP, DeepSpeed,
    device_map).
    """

    def __init__(
        self, trainer: GRPOTrainer, beta_min: float, beta_max: float, explore_fraction: float = 0.3
    ):
        self.trainer, self.beta_min, self.beta_max = trainer, beta_min, beta_max
        self.explore_fraction = explore_fraction
        self._schedule(1)  # raises for bad numbers now rather than at the first step
        if trainer.beta == 0 and beta_max > 0:
            _add_reference(trainer)
        self._set_beta(0, 1)

    def _schedule(self, total_steps: int) -> DynamicKL:
        return DynamicKL(self.beta_min, self.beta_max, total_steps, self.explore_fraction)

    def _set_beta(self, step: int, total_steps: int) -> None:
        beta = self._schedule(total_steps)(step)
        # At an exact 0, TRL would not compute reference log-probs of a batch that later steps use
        # again. The smallest float is 0 in fp32.
        self.trainer.beta = max(beta, sys.float_info.min) if self.beta_max > 0 else beta

    def on_step_begin(self, args, state, control, **kwargs):
        """Set the β of the coming optimizer step."""
        self._set_beta(state.global_step, state.max_steps)
        self.trainer._metrics["train"]["beta"].append(self.trainer.beta)


def _add_reference(trainer: GRPOTrainer) -> None:
    """Give a trainer that was made with β = 0 the reference of any other β: the model as it is."""
    model = trainer.model
    if trainer.is_deepspeed_enabled or trainer.is_fsdp_enabled or hasattr(model, "hf_device_map"):
        raise ValueError(
            "beta is 0, and a sharded model cannot be copied: give GRPOConfig a beta above 0 to "
            "start with"
        )
    if is_peft_available() and hasattr(model, "peft_config"):
        if "ref" not in model.peft_config:
            _copy_adapter(model)
        return
    reference = copy.deepcopy(model).requires_grad_(False).eval()
    for module in (reference, reference.get_output_embeddings()):
        vars(module).pop("forward", None)  # TRL's and ours, which are bound to the policy
    add_fused_lm_head(reference, trainer.temperature, trainer.args.cast_lm_head_to_fp32)
    trainer.ref_model = trainer.accelerator.prepare_model(reference, evaluation_mode=True)
    if hasattr(trainer, "fuse_head"):
        trainer.fuse_head(trainer.ref_model)


def _copy_adapter(model: nn.Module) -> None:
    """Add a frozen copy of the active adapter as "ref", where TRL looks for the reference."""
    active = model.active_adapter
    model.add_adapter("ref", model.peft_config[active])
    for name, parameter in model.named_parameters():
        if f".{active}." in name:
            reference = model.get_parameter(name.replace(f".{active}.", ".ref."))
            reference.data.copy_(parameter.data)
            reference.requires_grad_(False)
