"""Encoding prompts with their images, packed as in training, and keeping their keys and values."""

import torch
from torch import Tensor, nn

from ..model.forward import LayerRun, lm_head_weight, packed_hidden
from ..packing import pack
from ..types import Prompt
from .cache import Pool, PromptKeys


def prefill(
    model: nn.Module,
    prompts: list[Prompt],
    pool: Pool,
    starts: list[int],
    layers: LayerRun | None = None,
) -> Tensor:
    """Encode P prompts: returns the final hidden states (P, D) of their last tokens.

    The keys and values of prompt i go into the pool from token `starts[i]` on. `layers` says how
    the layers are computed.
    """
    device = lm_head_weight(model).device
    # A completion of one token is no input, but makes the prompt's last token a row of the result.
    first = [torch.zeros(1, dtype=torch.int64)] * len(prompts)
    batch = pack(prompts, first, list(range(len(prompts))))
    spans = [
        torch.arange(start, start + len(p.input_ids))
        for start, p in zip(starts, prompts, strict=True)
    ]
    cache = PromptKeys(pool, torch.cat(spans).to(device))
    return packed_hidden(model, batch.to(device), layers, past_key_values=cache)
