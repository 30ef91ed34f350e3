"""The policy: the model in training, with what turns examples into its inputs."""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import nn

from ..distributed.sharding import Sharding
from ..loss import linear_token_logprobs
from ..types import PackedBatch
from .forward import LayerRun, lm_head_weight, packed_hidden, trained_layers
from .processor import Processor
from .prompt import PromptEncoder


@dataclass
class Policy:
    """A model with its processor and its prompt encoder."""

    model: nn.Module
    processor: Processor
    encode: PromptEncoder
    layers: LayerRun = field(default_factory=LayerRun)
    """How the layers are computed."""
    adapters_go_on: bool = False
    """Whether its adapters are those of an earlier run, and not new."""

    @property
    def device(self) -> torch.device:
        """The device that holds the model's weights."""
        return lm_head_weight(self.model).device

    def recompute_all(self) -> bool:
        """Run all layers that are trained again in the backward pass.

        Returns whether that is a change.
        """
        run, before = self.layers, replace(self.layers)
        run.recompute_text, run.recompute_vision = trained_layers(self.model)
        return run != before

    def hidden(self, batch: PackedBatch) -> torch.Tensor:
        """Return the final hidden states (N, D) of the batch's rows that carry loss.

        The LM head turns them into logits.
        """
        return packed_hidden(self.model, batch, self.layers)

    def logprobs(self, batch: PackedBatch, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the log-probability and the entropy, (N,) fp32 each, at the batch's N targets."""
        return self.logprobs_of(self.hidden(batch), batch, temperature)

    @torch.no_grad()
    def logprobs_by_pack(
        self, batches: Sequence[PackedBatch], temperature: float, sharding: Sharding
    ) -> list[torch.Tensor]:
        """Return the log-probability, (N,) fp32, of each target of each of the packs.

        The packs may be in host memory. Where `sharding` has the weights in parts, all processes
        come here, each with its own packs.
        """

        def compute() -> list[torch.Tensor]:
            packs = sharding.aligned(batches)
            return [self.logprobs(pack.to(self.device), temperature)[0] for pack in packs]

        return sharding.within(compute)[: len(batches)]

    def logprobs_of(
        self, hidden: torch.Tensor, batch: PackedBatch, temperature: float
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Return `logprobs`, given the final hidden states (N, D) of the batch."""
        head = lm_head_weight(self.model)
        return linear_token_logprobs(hidden, head, batch.targets, temperature)
