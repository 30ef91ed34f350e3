"""The forward pass over packed tokens.

It computes no padding, encodes a prompt's images once for all of its completions, and returns
hidden states only for the rows that carry loss.

Nothing here keeps state on the model. Positions are always passed in, so transformers'
`rope_deltas`, which `generate` leaves on the model, can never reach a training forward.
"""

import torch
from torch import nn

from ..types import PackedBatch


def base_model(model: nn.Module) -> nn.Module:
    """Return the `…ForConditionalGeneration` under a PEFT wrapper, or the model itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def lm_head_weight(model: nn.Module) -> torch.Tensor:
    """Return the LM head's weight (V, D)."""
    return base_model(model).lm_head.weight


def embed(
    model: nn.Module,
    input_ids: torch.Tensor,
    pixel_values: torch.Tensor | None,
    image_grid_thw: torch.Tensor | None,
) -> torch.Tensor:
    """Return token embeddings (…, D) with image features in the place of image tokens.

    `pixel_values` (P, 3·2·14·14) and `image_grid_thw` (I, 3) hold the images in the order of their
    tokens; both are None for text alone.
    """
    inner = base_model(model).model
    embeddings = inner.get_input_embeddings()(input_ids)
    if pixel_values is None:
        return embeddings
    features = torch.cat(
        inner.get_image_features(pixel_values, image_grid_thw, return_dict=True).pooler_output
    )
    image_tokens = (input_ids == inner.config.image_token_id).unsqueeze(-1)
    return embeddings.masked_scatter(image_tokens, features.to(embeddings.dtype))


def packed_hidden(model: nn.Module, batch: PackedBatch, past_key_values=None) -> torch.Tensor:
    """Return the final hidden states (N, D) of the rows that carry loss, in the model's dtype.

    `past_key_values` is a transformers cache that collects each layer's keys and values, or None.
    """
    embeddings = embed(model, batch.input_ids, batch.pixel_values, batch.image_grid_thw)
    output = base_model(model).model.language_model(
        inputs_embeds=embeddings.unsqueeze(0),
        position_ids=batch.position_ids.unsqueeze(1),
        # Completions are kept apart by `segments`, not by a mask.
        attention_mask={"full_attention": None},
        past_key_values=past_key_values,
        use_cache=past_key_values is not None,
        segments=batch.segments,
    )
    return output.last_hidden_state[0].index_select(0, batch.loss_rows)
