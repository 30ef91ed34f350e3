"""Attention over sequences laid end to end, registered with transformers by name.

`packed_attention` is called three ways:
- packed text (training): one row of T tokens with `cu_seq_lens_q`; causal within each sequence;
- packed images (the vision tower): one row of P patches with `cu_seq_lens_q`; full attention within each image;
- a padded batch with a KV cache (rollout): no `cu_seq_lens_q`; transformers' own SDPA function with its mask.

Packed sequences are padded on the right inside this function only, for one SDPA call: a causal query never reaches
the padding behind it, and the rows of padded queries are dropped.
"""

import torch
import torch.nn.functional as F
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

TEXT_NAME = "mr1_packed"
VISION_NAME = "mr1_packed_flash"
"""transformers hands cu_seqlens to a vision tower's attention only if its name contains "flash"; otherwise it loops
over the images in Python."""


def packed_attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    cu_seq_lens_q: torch.Tensor | None = None,
    max_length_q: int | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[torch.Tensor, None]:
    """Scaled dot-product attention within each packed sequence.

    query (1, H, T, d), key and value (1, H_kv, T, d), `cu_seq_lens_q` (S+1,) int32, `max_length_q` the longest
    sequence. Returns ((1, T, H, d), None). Without `cu_seq_lens_q` it is transformers' SDPA on a padded batch.
    """
    if cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module, query, key, value, attention_mask, scaling=scaling, is_causal=is_causal, **kwargs
        )
    is_causal = module.is_causal if is_causal is None else is_causal
    lengths = cu_seq_lens_q.diff()
    num_sequences, num_tokens = lengths.numel(), query.shape[2]
    max_length = int(max_length_q) if max_length_q is not None else int(lengths.max())
    even = num_sequences * max_length == num_tokens

    if even:
        rows = None
    else:
        offsets = torch.arange(max_length, device=query.device)
        rows = (cu_seq_lens_q[:-1, None] + offsets).clamp(max=num_tokens - 1).flatten()

    def unpack(x: torch.Tensor) -> torch.Tensor:  # (1, H, T, d) -> (S, H, max_length, d)
        x = x[0] if rows is None else x[0].index_select(1, rows)
        return x.unflatten(1, (num_sequences, max_length)).transpose(0, 1)

    # Causal queries see only real keys; full attention over unequal lengths must be told where the keys end.
    mask = None if is_causal or even else (offsets < lengths[:, None])[:, None, None, :]
    out = F.scaled_dot_product_attention(
        unpack(query),
        unpack(key),
        unpack(value),
        attn_mask=mask,
        scale=scaling,
        is_causal=is_causal,
        enable_gqa=query.shape[1] != key.shape[1],
    )
    out = out.transpose(1, 2).flatten(0, 1)  # (S·max_length, H, d)
    if not even:
        token = torch.arange(num_tokens, device=query.device)
        sequence = torch.searchsorted(cu_seq_lens_q[1:], token, right=True)
        out = out.index_select(0, sequence * max_length + token - cu_seq_lens_q[sequence])
    return out.unsqueeze(0), None


def use_packed_attention(model: torch.nn.Module) -> None:
    """Make a `…ForConditionalGeneration` of the Qwen2-VL family use `packed_attention` in text and vision."""
    model.set_attn_implementation({"text_config": TEXT_NAME})
    # Set on the configuration: set_attn_implementation would look for a flash-attn package by that name.
    model.model.visual.config._attn_implementation = VISION_NAME


AttentionInterface.register(TEXT_NAME, packed_attention)
AttentionInterface.register(VISION_NAME, packed_attention)
AttentionMaskInterface.register(TEXT_NAME, sdpa_mask)
