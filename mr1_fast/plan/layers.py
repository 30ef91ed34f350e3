"""Bytes that a model's parts hold and allocate, found without data: torch's meta device runs them, we count.

So no formula has to follow transformers or peft: whatever a layer saves for its backward pass, or casts to fp32, shows.
What the meta device cannot know has a stand-in here that allocates the same: attention kernels and 4-bit products.
"""

import weakref
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint
from transformers import (
    AttentionInterface,
    AttentionMaskInterface,
    AutoModelForImageTextToText,
    PretrainedConfig,
)
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..config import ModelConfig
from ..model.attention import VARLEN_DTYPES
from ..model.load import with_lora
from ..model.patches import use_patch_projection


def nbytes(module: nn.Module, trainable: bool = False) -> int:
    """Bytes of a module's parameters and buffers, or of its trainable parameters alone."""
    if trainable:
        return sum(p.nbytes for p in module.parameters() if p.requires_grad)
    return sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))


class LiveBytes(TorchDispatchMode):
    """Context that counts the bytes of tensors made within it: those alive (`live`), and the most at once (`peak`).

    `casts`: the operands of a sum or product of two dtypes are cast first, as a CPU does; CUDA casts in its kernel.
    """

    def __init__(self, casts: bool):
        super().__init__()
        self.live = self.peak = 0
        self.casts = casts
        self.known = weakref.WeakSet()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        self.known.update(
            x.untyped_storage() for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)
        )
        result = function(*args, **(kwargs or {}))
        for x in tree_leaves(result):
            if (
                isinstance(x, Tensor) and (storage := x.untyped_storage()) not in self.known
            ):  # no view, not in place
                self.known.add(storage)
                self.live += storage.nbytes()
                self.peak = max(self.peak, self.live)
                weakref.finalize(storage, self._freed, storage.nbytes())
        if self.casts and function in (torch.ops.aten.add.Tensor, torch.ops.aten.mul.Tensor):
            cast = [x for x in args if isinstance(x, Tensor) and x.ndim and x.dtype != result.dtype]
            self.peak = max(self.peak, self.live + sum(x.numel() for x in cast) * result.itemsize)
        return result

    def _freed(self, size: int) -> None:
        self.live -= size


# --- stand-ins ----------------------------------------------------------------------------------------------------

NAMES = {"cuda": ("mr1_plan", "mr1_plan_flash"), "cpu": ("mr1_plan_cpu", "mr1_plan_cpu_flash")}
"""Of our attention in transformers, for text and vision, by the device that is planned for."""


def _attention(
    device: str,
    module,
    query,
    key,
    value,
    attention_mask,
    segments=None,
    cu_seq_lens_q=None,
    **kwargs,
):
    """Allocates what model/attention.py's packed_attention does on `device`."""
    if segments is None and cu_seq_lens_q is None:
        with _SDPA(device):
            return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    varlen = device == "cuda" and query.dtype in VARLEN_DTYPES
    query, key, value = (x[0].transpose(0, 1) for x in (query, key, value))
    if segments is None:
        if varlen:
            return _Varlen.apply(query, key, value, len(cu_seq_lens_q)).unsqueeze(0), None
        count, longest = len(cu_seq_lens_q) - 1, int(cu_seq_lens_q.diff().max())
        return _rectangle(query, key, value, (count, longest, longest), None)[
            : len(query)
        ].unsqueeze(0), None
    if varlen:
        key, value = (_Rows.apply(x, len(segments.key_rows)) for x in (key, value))
        return _Varlen.apply(query, key, value, len(segments.cu_seqlens_q)).unsqueeze(0), None
    outputs = []
    for rectangle in segments.padded.rectangles:
        visible = rectangle.visible
        mask = (
            None
            if visible is None
            else torch.empty(visible.shape, dtype=query.dtype, device="meta")
        )
        outputs.append(_rectangle(query, key, value, rectangle.shape, mask))
    return _Rows.apply(torch.cat(outputs), len(query)).unsqueeze(0), None


def _rectangle(query, key, value, shape: tuple[int, int, int], mask: Tensor | None) -> Tensor:
    count, length_q, length_k = shape
    rows = count * length_q, count * length_k, count * length_k
    gathered = [
        x if len(x) == n else _Rows.apply(x, n)
        for x, n in zip((query, key, value), rows, strict=True)
    ]
    lengths = length_q, length_k, length_k
    q, k, v = (
        x.unflatten(0, (count, n)).transpose(1, 2) for x, n in zip(gathered, lengths, strict=True)
    )
    out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask)[0]
    return out.transpose(1, 2).flatten(0, 1)


class _Rows(torch.autograd.Function):
    """segments.Gather: `count` rows of x, each in a place of its own."""

    @staticmethod
    def forward(ctx, x: Tensor, count: int) -> Tensor:
        ctx.rows = len(x)
        return x.new_empty(count, *x.shape[1:])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.new_empty(ctx.rows, *gradient.shape[1:]), None


class _Varlen(torch.autograd.Function):
    """FlashAttention-2's varlen kernels on query (T, H, d), key and value (K, H_kv, d).

    Its backward keeps dq in fp32 and, where heads share keys, dk and dv per head (csrc/flash_attn/flash_api.cpp,
    mha_varlen_bwd; torch's varlen_attn calls the same kernels).
    """

    @staticmethod
    def forward(ctx, query: Tensor, key: Tensor, value: Tensor, segments: int) -> Tensor:
        out = torch.empty_like(query, memory_format=torch.contiguous_format)
        logsumexp = query.new_empty(query.shape[1], len(query), dtype=torch.float32)
        ctx.save_for_backward(query, key, value, out, logsumexp)
        ctx.segments = segments
        return out

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        query, key, value, *_ = ctx.saved_tensors
        padded = len(query) + 128 * ctx.segments
        temporary = [query.new_empty(padded, *query.shape[1:], dtype=torch.float32)]
        temporary += [query.new_empty(padded, query.shape[1], dtype=torch.float32)]
        if query.shape[1] != key.shape[1]:
            temporary += [query.new_empty(len(key), *query.shape[1:]) for _ in range(2)]
        return *(torch.empty_like(x) for x in (query, key, value)), None


class _SDPA(TorchFunctionMode):
    """Within, F.scaled_dot_product_attention allocates its output and the mask as numbers: no kernel keeps scores."""

    def __init__(self, device: str):
        super().__init__()
        self.copies = 2 if device == "cuda" else 1  # CUDA's memory-efficient kernel pads the mask

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        query, mask = args[0], kwargs.get("attn_mask")
        masks = [] if mask is None else [query.new_empty(mask.shape) for _ in range(self.copies)]  # noqa: F841
        return torch.empty_like(
            query.transpose(1, 2), memory_format=torch.contiguous_format
        ).transpose(1, 2)


class FourBitLinear(nn.Linear):
    """bitsandbytes' Linear4bit, nf4: half a byte a weight, a byte for 64, fp32 for 64·256; dequantised where used."""

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.bias = (
            linear.in_features,
            linear.out_features,
            linear.bias,
        )
        count = linear.weight.numel()
        meta = dict(device="meta")
        self.weight = nn.Parameter(
            torch.empty(-(-count // 2), dtype=torch.uint8, **meta), requires_grad=False
        )
        self.register_buffer("absmax", torch.empty(-(-count // 64), dtype=torch.uint8, **meta))
        self.register_buffer(
            "nested_absmax", torch.empty(-(-count // (64 * 256)), dtype=torch.float32, **meta)
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) -> (…, out)."""
        return _FourBitProduct.apply(x, self.out_features)


class _FourBitProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor, out_features: int) -> Tensor:
        ctx.in_features = x.shape[-1]
        dequantised = x.new_empty(out_features, ctx.in_features)  # noqa: F841
        return x.new_empty(*x.shape[:-1], out_features)

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        dequantised = gradient.new_empty(gradient.shape[-1], ctx.in_features)  # noqa: F841
        return gradient.new_empty(*gradient.shape[:-1], ctx.in_features), None


for _device, _names in NAMES.items():
    for _name in _names:
        AttentionInterface.register(
            _name, lambda *args, _device=_device, **kwargs: _attention(_device, *args, **kwargs)
        )
        AttentionMaskInterface.register(_name, sdpa_mask)


def meta_model(
    config: ModelConfig, model_config: PretrainedConfig, dtype: torch.dtype, device: str
) -> nn.Module:
    """The policy's model as it is trained on `device`, without data: quantised, with adapters, what trains marked."""
    settings = {
        name: value
        for name, value in model_config.to_dict().items()
        if name != "quantization_config"
    }
    model_config = type(model_config).from_dict(
        settings
    )  # without what another model has set on it
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(model_config, dtype=dtype)
    text, vision = NAMES[device]
    model.set_attn_implementation({"text_config": text})
    model.model.visual.config._attn_implementation = vision
    use_patch_projection(model)
    if config.load_in_4bit:
        for module in list(model.model.language_model.modules()):
            for name, child in module.named_children():
                if type(child) is nn.Linear:
                    setattr(module, name, FourBitLinear(child))
        model.requires_grad_(False)
    return with_lora(model, config).train() if config.lora else model.train()


# --- layers -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Stack:
    """Bytes of `depth` equal layers on one batch of tokens, beside their weights and the first one's input."""

    depth: int
    infer: int
    """Most at once in one layer without gradients, its output included."""
    saved: int = 0
    """Kept by each layer's forward for its backward, its output included where that is kept."""
    extra: int = 0
    """Most at once in one layer's backward, with what its forward kept, beside its input and the incoming gradient."""
    gradients: int = 0
    """Of each layer's weights."""


def trace(
    layers: list[nn.Module], x: Tensor, call: Callable, device: str, trains: bool, recompute=False
) -> Stack:
    """The bytes of `call(layer, x)` for each of equal `layers`, one feeding the next, x being the first's input.

    `recompute`: with activation checkpointing.
    """
    layer, casts = layers[0], device == "cpu"
    with torch.no_grad(), LiveBytes(casts) as count:
        call(layer, x)
    if not trains:
        return Stack(len(layers), count.peak)
    infer = count.peak

    def forward(x):
        return checkpoint(call, layer, x, use_reentrant=False) if recompute else call(layer, x)

    x = x.detach().requires_grad_(x.is_floating_point())
    with LiveBytes(casts) as count:
        y = forward(x)
        saved = count.live
        if len(layers) > 1:  # whether an output is kept shows only once a layer has used it
            y = forward(y)
            saved = count.live - saved
    y = gradient = None
    with LiveBytes(casts) as count:
        y = forward(x)
        gradient = torch.empty_like(y)
        outside = y.nbytes + gradient.nbytes
        count.peak = 0
        y.backward(gradient)
    layer.zero_grad(set_to_none=True)
    return Stack(len(layers), infer, saved, count.peak - outside, nbytes(layer, trainable=True))
