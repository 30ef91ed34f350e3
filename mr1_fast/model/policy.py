"""The policy: the model in training, with what turns examples into its inputs."""

from dataclasses import dataclass, field, replace

import torch
from torch import nn

from ..loss import linear_token_logprobs
from ..types import PackedBatch
from .forward import LayerRun, base_model, lm_head_weight, packed_hidden
from .processor import ImageTextProcessor
from .prompt import PromptEncoder


@dataclass
class Policy:
    """A model with its processor and its prompt encoder."""

    model: nn.Module
    processor: ImageTextProcessor
    encode: PromptEncoder
    layers: LayerRun = field(default_factory=LayerRun)
    """How the layers are computed."""

    @property
    def device(self) -> torch.device:
        """The device that holds the model's weights."""
        return lm_head_weight(self.model).device

    def recompute_all(self) -> bool:
        """Run all layers that are trained again in the backward pass.

        Returns whether that is a change.
        """
        inner, run = base_model(self.model).model, self.layers
        before = replace(run)
        trains_vision = any(p.requires_grad for p in inner.visual.parameters())
        run.recompute_text = len(inner.language_model.layers)
        run.recompute_vision = len(inner.visual.blocks) if trains_vision else 0
        return run != before

    def hidden(self, batch: PackedBatch) -> torch.Tensor:
        """Return the final hidden states (N, D) of the batch's rows that carry loss.

        The LM head turns them into logits.
        """
        return packed_hidden(self.model, batch, self.layers)

    def logprobs(self, batch: PackedBatch, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Return the log-probability and the entropy, (N,) fp32 each, at the batch's N targets."""
        return linear_token_logprobs(
            self.hidden(batch), lm_head_weight(self.model), batch.targets, temperature
        )
