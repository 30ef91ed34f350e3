"""Prompts, with their images, once: packed as in training, their keys and values kept in the pool."""

import itertools

import torch
from torch import Tensor, nn

from ..model.forward import base_model, embed, lm_head_weight
from ..segments import Segments, cumulative
from ..types import Prompt
from .cache import Pool, PromptKeys


def prefill(model: nn.Module, prompts: list[Prompt], pool: Pool, starts: list[int]) -> Tensor:
    """Final hidden states (P, D) of the prompts' last tokens; the pool has their keys and values from `starts` on."""
    device = lm_head_weight(model).device
    lengths = [len(prompt.input_ids) for prompt in prompts]
    bounds = cumulative(lengths).tolist()
    segments = Segments.build([(torch.arange(a, b), b - a) for a, b in itertools.pairwise(bounds)])
    rows = torch.cat([torch.arange(start, start + n) for start, n in zip(starts, lengths, strict=True)])
    pictured = [prompt for prompt in prompts if prompt.num_image_tokens]
    embeddings = embed(
        model,
        torch.cat([prompt.input_ids for prompt in prompts]).to(device),
        torch.cat([prompt.pixel_values for prompt in pictured]).to(device) if pictured else None,
        torch.cat([prompt.image_grid_thw for prompt in pictured]).to(device) if pictured else None,
    )
    output = base_model(model).model.language_model(
        inputs_embeds=embeddings[None],
        position_ids=torch.cat([prompt.position_ids for prompt in prompts], dim=1).to(device)[:, None],
        attention_mask={"full_attention": None},  # prompts are kept apart by `segments`
        past_key_values=PromptKeys(pool, rows.to(device)),
        use_cache=True,
        segments=segments.to(device),
    )
    return output.last_hidden_state[0, torch.tensor(bounds[1:], device=device) - 1]
