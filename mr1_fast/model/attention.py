"""Attention over segments laid end to end, registered with transformers by name.

`packed_attention` is called in three ways:
- for packed text, in training: one row of T tokens with `segments`, which share prefixes; the
  attention is causal and aligned at the end;
- for packed images, in the vision tower: one row of P patches with `cu_seq_lens_q`; each patch
  attends to its whole image;
- for a padded batch, as transformers' own `generate` passes it: with neither of the two;
  transformers' SDPA function computes it.

Packed tokens are computed by one of three kernels: flash-attn's function for variable lengths where
that package is installed, torch's `varlen_attn` on NVIDIA GPUs, and otherwise torch's SDPA over
segments that are padded on the right.
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
from .description import check_layers
from .families import base_model, text_model, vision_tower

TEXT_NAME = "mr1_packed"
"""The name of `packed_attention` in transformers, for the language model."""
VISION_NAME = "mr1_packed_flash"
"""Its name for the vision tower. transformers passes `cu_seq_lens_q` only to an attention whose
name contains "flash"; for any other it loops over the images in Python."""
VARLEN_DTYPES = (torch.bfloat16, torch.float16)
"""The dtypes in which kernels for variable lengths compute."""


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
    """Compute scaled dot-product attention within packed segments.

    `query` is (1, H, T, d), `key` and `value` are (1, H_kv, T, d). Returns ((1, T, H, d), None), as
    transformers expects it. `segments` says which tokens see which. With `cu_seq_lens_q` (S+1,)
    int32 instead, a token sees its whole sequence, the longest of which has `max_length_q` tokens.
    With neither, transformers' SDPA computes a padded batch.
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

    # (T, heads, d), which is dense in memory
    query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
    varlen = _varlen(attention_kernel(query.device.type, query.dtype))
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


# --- variable lengths -----------------------------------------------------------------------------


def uses_varlen(device_type: str, dtype: torch.dtype) -> bool:
    """Return whether kernels for variable lengths exist for a device type and a dtype.

    FlashAttention's kernels and torch's own compute 16-bit numbers on CUDA. No device is asked, so
    that memory can be planned for a GPU that is not here; `attention_kernel` decides for the card
    of this machine.
    """
    return device_type == "cuda" and dtype in VARLEN_DTYPES


@lru_cache
def attention_kernel(device_type: str, dtype: torch.dtype) -> str:
    """Return which kernel computes packed attention here: `flash_attn`, `torch_varlen` or `sdpa`.

    Kernels for variable lengths need an A100, an RTX 30 or a later card; torch's own needs
    NVIDIA's.
    """
    if not uses_varlen(device_type, dtype) or torch.cuda.get_device_capability() < (8, 0):
        return "sdpa"
    try:
        from flash_attn import flash_attn_varlen_func  # noqa: F401
    except ImportError:
        return "torch_varlen" if torch.version.hip is None else "sdpa"
    return "flash_attn"


@lru_cache
def _varlen(kernel: str):
    """Return the kernel as f(q, k, v, cu_seqlens_q, cu_seqlens_k, max_q, max_k, causal=, scale=).

    Returns None for `sdpa`, which knows no variable lengths.
    """
    if kernel == "sdpa":
        return None
    if kernel == "flash_attn":
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


# --- SDPA -----------------------------------------------------------------------------------------


def _padded_attention(
    query: Tensor, key: Tensor, value: Tensor, segments: Segments, scale: float | None
) -> Tensor:
    """Compute (T, H, d) with one SDPA call for the prompts and one for the completions."""
    outputs = []
    for rectangle in segments.padded.rectangles:
        count, length_q, length_k = rectangle.shape
        out = F.scaled_dot_product_attention(
            rectangle.queries(query).unflatten(0, (count, length_q)).transpose(1, 2),
            rectangle.keys(key).unflatten(0, (count, length_k)).transpose(1, 2),
            rectangle.keys(value).unflatten(0, (count, length_k)).transpose(1, 2),
            attn_mask=rectangle.mask(query.dtype),
            scale=scale,
            # Without a mask, plain causal attention: a query never sees the padding behind it.
            is_causal=rectangle.visible is None,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        outputs.append(out.transpose(1, 2).flatten(0, 1))
    return segments.padded.unpad(torch.cat(outputs))


def _full_attention(
    query: Tensor, key: Tensor, value: Tensor, cu_seqlens: Tensor, longest: int, scale: float | None
) -> Tensor:
    """Compute full attention (P, H, d) within each sequence, the longest of `longest` patches."""
    lengths = cu_seqlens.diff()
    count, num_tokens = len(lengths), len(query)
    if count * longest == num_tokens:  # all sequences have the same length
        rows = mask = None
    else:
        offsets = torch.arange(longest, device=query.device)
        rows = (cu_seqlens[:-1, None] + offsets).clamp(max=num_tokens - 1).flatten()
        mask = (offsets < lengths[:, None])[:, None, None, :]

    def pad(x: Tensor) -> Tensor:  # from (P, H, d) to (S, H, longest, d)
        x = x if rows is None else x.index_select(0, rows)
        return x.unflatten(0, (count, longest)).transpose(1, 2)

    out = F.scaled_dot_product_attention(
        pad(query), pad(key), pad(value), attn_mask=mask, scale=scale
    )
    out = out.transpose(1, 2)  # (S, longest, H, d)
    return out.flatten(0, 1) if rows is None else out[(offsets < lengths[:, None])]


def use_packed_attention(model: torch.nn.Module) -> None:
    """Make a model use `packed_attention` in its language model and in its vision tower.

    Raises UserError for a model that attends in another way, or is of no family that is known here.
    """
    config = base_model(model).config
    check_layers(config.name_or_path or "given here", config)
    # set_attn_implementation would take "flash" in a name for a wish for the package flash-attn.
    text_model(model).config._attn_implementation = TEXT_NAME
    if tower := vision_tower(model):
        tower.config._attn_implementation = VISION_NAME


AttentionInterface.register(TEXT_NAME, packed_attention)
AttentionInterface.register(VISION_NAME, packed_attention)
AttentionMaskInterface.register(TEXT_NAME, sdpa_mask)
