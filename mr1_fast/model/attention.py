"""Attention over segments laid end to end, registered with transformers by name.

`packed_attention` is called three ways:
- packed text (training): one row of T tokens with `segments`, which share prefixes; causal, aligned at the end;
- packed images (the vision tower): one row of P patches with `cu_seq_lens_q`; full attention within each image;
- a padded batch (transformers' own `generate` on such a model): neither; its SDPA function with its mask.

Three back ends: flash-attn's varlen function where installed, torch's varlen_attn on CUDA, and otherwise SDPA over
segments padded on the right.
"""

import inspect
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..segments import Segments

TEXT_NAME = "mr1_packed"
VARLEN_DTYPES = (torch.bfloat16, torch.float16)
VISION_NAME = "mr1_packed_flash"
"""transformers hands cu_seqlens to a vision tower's attention only if its name contains "flash"; otherwise it loops
over the images in Python."""


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    segments: Segments | None = None,
    cu_seq_lens_q: Tensor | None = None,
    max_length_q: int | None = None,
    is_causal: bool | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Scaled dot-product attention within packed segments.

    query (1, H, T, d), key and value (1, H_kv, T, d). Returns ((1, T, H, d), None). `segments` says which tokens see
    which; with `cu_seq_lens_q` (S+1,) int32 tokens see all of their sequence, the longest of which has `max_length_q`;
    with neither it is transformers' SDPA on a padded batch.
    """
    if segments is None and cu_seq_lens_q is None:
        return sdpa_attention_forward(
            module,
            query,
            key,
            value,
            attention_mask,
            scaling=scaling,
            is_causal=is_causal,
            **kwargs,
        )
    query, key, value = (
        x[0].transpose(0, 1) for x in (query, key, value)
    )  # (T, heads, d), dense in memory
    varlen = _varlen(backend(query.device.type, query.dtype))
    if segments is not None:
        if varlen is None:
            out = _padded_attention(query, key, value, segments, scaling)
        else:
            key, value = segments.keys(key), segments.keys(value)
            bounds = (segments.cu_seqlens_q, segments.cu_seqlens_k, segments.max_q, segments.max_k)
            out = varlen(query, key, value, *bounds, causal=True, scale=scaling)
    else:
        longest = int(cu_seq_lens_q.diff().max() if max_length_q is None else max_length_q)
        if varlen is None:
            out = _full_attention(query, key, value, cu_seq_lens_q, longest, scaling)
        else:
            bounds = (cu_seq_lens_q, cu_seq_lens_q, longest, longest)
            out = varlen(query, key, value, *bounds, causal=False, scale=scaling)
    return out.unsqueeze(0), None


# --- variable lengths ---------------------------------------------------------------------------------------------


def takes_variable_lengths(device: str, dtype: torch.dtype) -> bool:
    """Whether variable-length kernels exist for a device type and a dtype, whatever GPU it is.

    FlashAttention's kernels and torch's own compute 16-bit numbers on CUDA. Asks no device, so
    that memory can be planned for a GPU that is not here.
    """
    return device == "cuda" and dtype in VARLEN_DTYPES


@lru_cache
def backend(device: str, dtype: torch.dtype) -> str:
    """What packed attention uses on a device type for a dtype: flash_attn, torch_varlen or sdpa.

    FlashAttention's kernels know 16-bit numbers, and devices from A100 and RTX 30 on; torch's own, NVIDIA's alone.
    """
    known = takes_variable_lengths(device, dtype)
    if not known or torch.cuda.get_device_capability() < (8, 0):
        return "sdpa"
    try:
        from flash_attn import flash_attn_varlen_func  # noqa: F401
    except ImportError:
        return "torch_varlen" if torch.version.hip is None else "sdpa"
    return "flash_attn"


@lru_cache
def _varlen(name: str):
    """The back end as f(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, causal=, scale=); None for `sdpa`."""
    if name == "sdpa":
        return None
    if name == "flash_attn":
        from flash_attn import flash_attn_varlen_func

        return lambda *arguments, causal, scale: flash_attn_varlen_func(
            *arguments, causal=causal, softmax_scale=scale
        )
    from torch.nn.attention.varlen import varlen_attn

    knows_gqa = "enable_gqa" in inspect.signature(varlen_attn).parameters

    def torch_varlen(query, key, value, *bounds, causal, scale):
        groups = query.shape[1] // key.shape[1]
        options = {"enable_gqa": groups > 1} if knows_gqa else {}
        if groups > 1 and not knows_gqa:
            key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
        window = (-1, 0) if causal else (-1, -1)
        return varlen_attn(query, key, value, *bounds, scale=scale, window_size=window, **options)

    return torch_varlen


# --- SDPA ---------------------------------------------------------------------------------------------------------


def _padded_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float | None
) -> Tensor:
    """One SDPA call for the prompts and one for the completions; (T, H, d)."""
    outputs = []
    for rectangle in segments.padded.rectangles:
        count, length_q, length_k = rectangle.shape
        out = F.scaled_dot_product_attention(
            rectangle.queries(query).unflatten(0, (count, length_q)).transpose(1, 2),
            rectangle.keys(key).unflatten(0, (count, length_k)).transpose(1, 2),
            rectangle.keys(value).unflatten(0, (count, length_k)).transpose(1, 2),
            attn_mask=rectangle.mask(query.dtype),
            scale=scale,
            is_causal=rectangle.visible
            is None,  # a causal query never reaches the padding behind it
            enable_gqa=query.shape[1] != key.shape[1],
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return segments.padded.unpad(torch.cat(outputs))


def _full_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, scale: float | None
) -> Tensor:
    """Full attention within each sequence; (P, H, d)."""
    lengths = cu_seqlens.diff()
    count, num_tokens = len(lengths), len(query)
    if count * longest == num_tokens:  # all of one length
        rows = mask = None
    else:
        offsets = torch.arange(longest, device=query.device)
        rows = (cu_seqlens[:-1, None] + offsets).clamp(max=num_tokens - 1).flatten()
        mask = (offsets < lengths[:, None])[:, None, None, :]

    def pad(x: Tensor) -> Tensor:  # (P, H, d) -> (S, H, longest, d)
        x = x if rows is None else x.index_select(0, rows)
        return x.unflatten(0, (count, longest)).transpose(1, 2)

    out = F.scaled_dot_product_attention(
        pad(query), pad(key), pad(value), attn_mask=mask, scale=scale
    )
    out = out.transpose(1, 2)  # (S, longest, H, d)
    return out.flatten(0, 1) if rows is None else out[(offsets < lengths[:, None])]


def use_packed_attention(model: torch.nn.Module) -> None:
    """Make a `…ForConditionalGeneration` of the Qwen2-VL family use `packed_attention` in text and vision."""
    model.set_attn_implementation({"text_config": TEXT_NAME})
    # Set on the configuration: set_attn_implementation would look for a flash-attn package by that name.
    model.model.visual.config._attn_implementation = VISION_NAME


AttentionInterface.register(TEXT_NAME, packed_attention)
AttentionInterface.register(VISION_NAME, packed_attention)
AttentionMaskInterface.register(TEXT_NAME, sdpa_mask)
