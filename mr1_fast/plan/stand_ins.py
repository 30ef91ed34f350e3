"""What the meta device cannot run, or needs a package for, replaced by what allocates the same.

Attention kernels, the vision tower's position embedding, bitsandbytes' 4-bit linear layer and
peft's LoRA layer: a plan imports neither package, and none of the others runs without data.
tests/plan/test_stand_ins.py holds the layers against peft's own.
"""

import re
from functools import partial
from types import SimpleNamespace

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from ..model.attention import uses_varlen
from ..model.families import lora_layers, text_model, vision_tower
from ..segments import Segments

# --- attention ------------------------------------------------------------------------------------

TEXT_NAMES = {"cuda": "mr1_plan", "cpu": "mr1_plan_cpu"}
"""Names in transformers of the language model's planned attention, by device type."""
VISION_NAMES = {"cuda": "mr1_plan_flash", "cpu": "mr1_plan_cpu_flash"}
"""The same for the vision tower: transformers passes cu_seqlens only to a name with "flash"."""


def use_planned_attention(model: nn.Module, device: str) -> None:
    """Make a model on the meta device allocate what attention does there."""
    # Set on the configurations: set_attn_implementation would look for a package by a vision name.
    text_model(model).config._attn_implementation = TEXT_NAMES[device]
    if (tower := vision_tower(model)) is not None:
        tower.config._attn_implementation = VISION_NAMES[device]


def planned_attention(
    device: str,
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    segments: Segments | None = None,
    cu_seq_lens_q: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """Allocate what `packed_attention` of model/attention.py does on `device`; same arguments."""
    if segments is None and cu_seq_lens_q is None:
        with _SDPA(device):
            return sdpa_attention_forward(module, query, key, value, attention_mask, **kwargs)
    has_kernel = uses_varlen(device, query.dtype)
    query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))

    if segments is None:
        if has_kernel:
            return _VariableLengths.apply(query, key, value, len(cu_seq_lens_q))[None], None
        count, longest = len(cu_seq_lens_q) - 1, int(cu_seq_lens_q.diff().max())
        out = _rectangle(query, key, value, (count, longest, longest), None)
        return out[: len(query)][None], None

    if has_kernel:
        key, value = (_Rows.apply(x, len(segments.key_rows)) for x in (key, value))
        return _VariableLengths.apply(query, key, value, len(segments.cu_seqlens_q))[None], None
    outputs = []
    for rectangle in segments.padded.rectangles:
        visible, mask = rectangle.visible, None
        if visible is not None:
            mask = torch.empty(visible.shape, dtype=query.dtype, device="meta")
        outputs.append(_rectangle(query, key, value, rectangle.shape, mask))
    return _Rows.apply(torch.cat(outputs), len(query))[None], None


def _rectangle(
    query: Tensor, key: Tensor, value: Tensor, shape: tuple[int, int, int], mask: Tensor | None
) -> Tensor:
    """SDPA on a CPU over (S, Lq, Lk) padded segments; (S·Lq, H, d)."""
    count, length_q, length_k = shape

    def pad(x: Tensor, length: int) -> Tensor:  # (T, H, d) -> (S, H, length, d)
        x = x if len(x) == count * length else _Rows.apply(x, count * length)
        return x.unflatten(0, (count, length)).transpose(1, 2)

    q, k, v = pad(query, length_q), pad(key, length_k), pad(value, length_k)
    out = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(q, k, v, attn_mask=mask)[0]
    return out.transpose(1, 2).flatten(0, 1)


class _Rows(torch.autograd.Function):
    """`count` rows taken from x (R, …), as `Gather` of segments.py takes them."""

    @staticmethod
    def forward(ctx, x: Tensor, count: int) -> Tensor:
        ctx.rows = len(x)
        return x.new_empty(count, *x.shape[1:])

    @staticmethod
    def backward(ctx, gradient: Tensor) -> tuple[Tensor, None]:
        return gradient.new_empty(ctx.rows, *gradient.shape[1:]), None


class _VariableLengths(torch.autograd.Function):
    """FlashAttention-2's varlen kernels on query (T, H, d), key and value (K, H_kv, d).

    Its backward keeps dq in fp32 and, if heads share keys, dk and dv per head
    (csrc/flash_attn/flash_api.cpp, mha_varlen_bwd; torch's varlen_attn calls the same kernels).
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
    """Context in which F.scaled_dot_product_attention allocates its output and its mask alone.

    No kernel of it keeps the scores. CUDA's memory-efficient kernel pads the mask into a copy.
    """

    def __init__(self, device: str):
        super().__init__()
        self.masks = 2 if device == "cuda" else 1

    def __torch_function__(self, function, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if function is not F.scaled_dot_product_attention:
            return function(*args, **kwargs)
        query, mask = args[0], kwargs.get("attn_mask")
        count = 0 if mask is None else self.masks
        masks = [query.new_empty(mask.shape) for _ in range(count)]  # noqa: F841
        rows_first = query.transpose(1, 2)
        return torch.empty_like(rows_first, memory_format=torch.contiguous_format).transpose(1, 2)


for _device in TEXT_NAMES:
    for _name in (TEXT_NAMES[_device], VISION_NAMES[_device]):
        AttentionInterface.register(_name, partial(planned_attention, _device))
        AttentionMaskInterface.register(_name, sdpa_mask)


# --- the vision tower's beginning -----------------------------------------------------------------

NEIGHBOURS = 4
"""Rows of a learned grid of positions that a patch's own is interpolated from."""


class PatchEmbedding(nn.Module):
    """The beginning of a vision tower: its patch embedding, and what it adds for the positions.

    transformers' own forward finds the positions from the sizes of images, which a tensor without
    data does not tell.
    """

    def __init__(self, tower: nn.Module):
        super().__init__()
        self.patches = tower.patch_embed
        self.positions = getattr(tower, "pos_embed", None)

    def forward(self, pixels: Tensor) -> Tensor:
        """pixels (P, C·t·p·p) -> (P, D)."""
        if self.positions is None:
            return self.patches(pixels)
        rows = pixels.new_empty(len(pixels), NEIGHBOURS, dtype=torch.int64)
        weights = pixels.new_empty(len(pixels), NEIGHBOURS, dtype=torch.float32)
        x = self.patches(pixels)
        added = (self.positions(rows) * weights[:, :, None]).sum(1)
        return x + added.to(x.dtype)


# --- linear layers --------------------------------------------------------------------------------


ADAPTER = "default"
"""The name that peft gives to a model's first adapter."""


class FourBitLinear(nn.Linear):
    """bitsandbytes' Linear4bit (nf4, double quantisation) without data.

    A weight takes half a byte, 64 weights share a scale of one byte, and 64·256 weights an fp32
    scale of these. It has the names by which FourBitWeight knows such a layer. By itself, each
    product makes the dequantised weight and drops it.
    """

    def __init__(self, linear: nn.Linear):
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.bias, self.compute_dtype = linear.bias, linear.weight.dtype

        def empty(count: int, dtype: torch.dtype) -> Tensor:
            return torch.empty(count, dtype=dtype, device="meta")

        count = linear.weight.numel()
        packed = empty(-(-count // 2), torch.uint8)
        self.weight = nn.Parameter(packed, requires_grad=False)
        self.register_buffer("absmax", empty(-(-count // 64), torch.uint8))
        self.register_buffer("nested_absmax", empty(-(-count // (64 * 256)), torch.float32))
        nested = SimpleNamespace(
            code=empty(256, torch.float32), absmax=self.nested_absmax, blocksize=256
        )
        self.weight.quant_state = SimpleNamespace(
            shape=linear.weight.shape, dtype=linear.weight.dtype, blocksize=64, nested=True,
            code=empty(16, torch.float32), absmax=self.absmax, state2=nested,
            offset=empty(1, torch.float32)[0],
        )  # fmt: skip

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


def use_four_bits(model: nn.Module) -> None:
    """Freeze a model and hold the language model's linear layers in 4 bits.

    model/load.py leaves the vision tower and the LM head as they are, and so does this.
    """
    for module in list(text_model(model).modules()):
        for name, child in module.named_children():
            if type(child) is nn.Linear:
                setattr(module, name, FourBitLinear(child))
    model.requires_grad_(False)


class LoraLinear(nn.Module):
    """peft's LoRA layer without data: W·x + B·A·x · scale, with A (rank, in) and B (out, rank).

    peft holds the adapters of 16-bit and 4-bit weights in fp32, and casts their input to it. The
    layer has peft's names, by which model/adapters.py knows it.
    """

    disable_adapters = merged = False
    active_adapters = (ADAPTER,)

    def __init__(self, linear: nn.Linear, rank: int):
        super().__init__()
        self.base_layer = linear
        self.in_features, self.out_features = linear.in_features, linear.out_features
        dtype = linear.weight.dtype
        if dtype.itemsize <= 2:
            dtype = torch.float32
        like = dict(bias=False, device="meta", dtype=dtype)
        a = nn.Linear(linear.in_features, rank, **like)
        b = nn.Linear(rank, linear.out_features, **like)
        self.lora_A, self.lora_B = (nn.ModuleDict({ADAPTER: part}) for part in (a, b))
        self.lora_dropout = nn.ModuleDict({ADAPTER: nn.Identity()})
        self.scaling = {ADAPTER: 2.0}

    def forward(self, x: Tensor) -> Tensor:
        """x (…, in) -> (…, out), in the dtype of the layer under the adapter."""
        a, b = self.lora_A[ADAPTER], self.lora_B[ADAPTER]
        result = self.base_layer(x)
        dtype = result.dtype
        x = x.to(a.weight.dtype)
        result = result + b(a(x)) * self.scaling[ADAPTER]
        return result.to(dtype)


def use_lora(model: nn.Module, rank: int) -> None:
    """Freeze a model and put adapters where `with_lora` of model/load.py has peft put them."""
    model.requires_grad_(False)
    pattern = lora_layers(model.config)
    for name, module in list(model.named_modules()):
        if re.fullmatch(pattern, name):
            parent, _, child = name.rpartition(".")
            setattr(model.get_submodule(parent), child, LoraLinear(module, rank))
