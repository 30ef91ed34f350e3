"""Prompts, with their images, once: packed as in training, their keys and values kept in the pool."""

import torch
from torch import Tensor, nn

from ..model.forward import lm_head_weight, packed_hidden
from ..packing import pack
from ..types import Prompt
from .cache import Pool, PromptKeys


def prefill(model: nn.Module, prompts: list[Prompt], pool: Pool, starts: list[int]) -> Tensor:
    """Final hidden states (P, D) of the prompts' last tokens; the pool has their keys and values from `starts` on."""
    device = lm_head_weight(model).device
    first = [torch.zeros(1, dtype=torch.int64)] * len(
        prompts
    )  # no input, but what a prompt's last token predicts
    batch = pack(prompts, first, list(range(len(prompts))))
    spans = [
        torch.arange(start, start + len(p.input_ids))
        for start, p in zip(starts, prompts, strict=True)
    ]
    return packed_hidden(model, batch.to(device), PromptKeys(pool, torch.cat(spans).to(device)))
