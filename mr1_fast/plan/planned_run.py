"""The run that is planned: its settings, its device, and its models without data."""

from dataclasses import dataclass, replace
from functools import cached_property

import torch
from transformers import PretrainedConfig

from ..config import TrainConfig
from ..model.device import device_name, dtype_name
from ..optim import state_block
from .layers import STORED, Training
from .meta_model import MetaModel, meta_model
from .sharded import ONE_CARD, Sharded


@dataclass
class PlannedRun:
    """A run for which no device, no weights and no data need to be here."""

    config: TrainConfig
    model_config: PretrainedConfig
    device: str
    """Device type that is planned for: `cuda` or `cpu`."""
    dtype: torch.dtype
    """Dtype of the weights that are not quantised."""
    processes: int = 1
    """Processes that train together, one for each card."""

    @cached_property
    def policy(self) -> MetaModel:
        """The model in training."""
        return meta_model(self.config, self.model_config, self.dtype, self.device)

    @cached_property
    def reference(self) -> MetaModel:
        """The model whose log-probabilities the KL term compares with (model/reference.py).

        With adapters it is the policy without them. A reference in 16 or 32 bits allocates what
        the policy does, and is the same object here.
        """
        if self.config.lora:
            plain = replace(self.config, lora=False)
            return meta_model(plain, self.model_config, self.dtype, self.device)
        if self.config.reference == "8bit":
            return meta_model(self.config, self.model_config, self.dtype, self.device, True)
        return self.policy

    @cached_property
    def sharded(self) -> Sharded:
        """What this process, one of several, holds; `sharding` is no longer `auto` here."""
        config = self.config
        if self.processes == 1:
            return ONE_CARD
        return Sharded(
            config.sharding,
            self.processes,
            whole_adapters=config.lora,
            block=state_block(self.policy.model, config),
        )

    @cached_property
    def sharded_reference(self) -> Sharded:
        """The same of the reference, which has no optimizer."""
        return replace(self.sharded, block=1)

    @cached_property
    def training(self) -> tuple[Training, ...]:
        """How layers train that keep their results, and how those that are run again.

        A CPU's memory is the host memory already.
        """
        config = self.config
        again = Training(True, offload=config.offload_checkpoints and self.device == "cuda")
        return {"none": (STORED,), "all": (again,), "auto": (STORED, again)}[config.recompute]


def planned_run(
    config: TrainConfig, model_config: PretrainedConfig, processes: int = 1
) -> PlannedRun:
    """The run of `config` on one of several processes.

    `--device auto` plans for a GPU, which need not be here. A step has the prompts of the process
    that has the most of them.
    """
    device, dtype = planned_device(config)
    config = replace(
        config,
        prompts_per_step=-(-config.prompts_per_step // processes),
        eval_samples=-(-config.eval_samples // processes),
    )
    return PlannedRun(config, model_config, device, dtype, processes)


def planned_device(config: TrainConfig) -> tuple[str, torch.dtype]:
    """Device type (`cuda` or `cpu`) and dtype that are planned for.

    `auto` is `cuda` here, since the card that is planned for need not be in this machine.
    """
    is_cuda = device_name(config, has_cuda=True).startswith("cuda")
    device = "cuda" if is_cuda else "cpu"
    return device, getattr(torch, dtype_name(config, device))
