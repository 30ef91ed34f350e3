"""One text layer and one vision block with all that they are called with, for bench_layers.py.

A part is on the meta device, with the memory plan's stand-ins for attention, LoRA and 4 bits; or it
has random numbers on a real device, with packed attention and the layers of peft and bitsandbytes.
"""

import copy
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig, Qwen2_5_VLConfig

from mr1_fast.config import ModelConfig
from mr1_fast.model.attention import TEXT_NAME, VISION_NAME
from mr1_fast.model.flop_count import causal_pairs
from mr1_fast.model.known import find_model_config
from mr1_fast.model.load import with_lora
from mr1_fast.plan.meta_model import MetaModel, meta_model
from mr1_fast.plan.workload import Workload
from mr1_fast.segments import Segments, cumulative

TEXT, VISION = "text layer", "vision block"
PARTS = (TEXT, VISION)
WINDOW = 64
"""Patches of a full window of Qwen2.5-VL's vision tower, 8 × 8."""


MODELS: dict[str, Callable[[], PretrainedConfig]] = {
    "2B": partial(find_model_config, "Qwen/Qwen2-VL-2B-Instruct"),
    "7B": partial(find_model_config, "Qwen/Qwen2-VL-7B-Instruct"),
    "2.5-3B": partial(find_model_config, "Qwen/Qwen2.5-VL-3B-Instruct"),
    "3-2B": partial(find_model_config, "Qwen/Qwen3-VL-2B-Instruct"),
    "3-4B": partial(find_model_config, "Qwen/Qwen3-VL-4B-Instruct"),
    "3-8B": partial(find_model_config, "Qwen/Qwen3-VL-8B-Instruct"),
    "tiny": partial(find_model_config, "tiny"),
}
"""Configurations of models: Qwen2-VL's, Qwen2.5-VL's and Qwen3-VL's, and the built-in tiny one."""

TRAINING = {
    "all weights": ModelConfig(),
    "LoRA": ModelConfig(lora=True, lora_rank=32),
    "LoRA on 4 bits": ModelConfig(lora=True, lora_rank=32, load_in_4bit=True),
}
"""What is trained. With LoRA the vision tower is frozen."""

WORK = Workload(prompts=[640] * 2, patches=[2048] * 2, completions=[305] * 16)
"""6,144 tokens: two prompts of 640 with an image of 512, and 8 completions each, of which a last
token is no input; 4,096 patches."""
QUICK_WORK = Workload(prompts=[32] * 2, patches=[60] * 2, completions=[8] * 8)
"""120 tokens and 120 patches, to try the scripts out."""


@dataclass
class Part:
    """A text layer on packed tokens, or a vision block on the patches of images."""

    layer: nn.Module
    x: Tensor
    """Hidden states: (1, T, D) of tokens, or (P, D) of patches."""
    angles: tuple[Tensor, Tensor]
    """Rotary cosines and sines: (1, T, d) in the model's dtype, or (P, d) in fp32."""
    segments: Segments | None
    """Which tokens attend to which; None for a vision block."""
    bounds: Tensor | None
    """(S+1,) int32: where each image or window of a vision block starts; None for a text layer."""
    longest: int
    """Patches of the longest image or window."""
    heads: int
    """The number of attention heads of the queries."""

    @property
    def tokens(self) -> int:
        """The number of tokens or patches."""
        return self.x.shape[-2]

    @property
    def width(self) -> int:
        """The width of a hidden state."""
        return self.x.shape[-1]

    @property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that get gradients."""
        return [p for p in self.layer.parameters() if p.requires_grad]

    @property
    def attention_flop(self) -> int:
        """Floating-point operations of attention in the forward pass: two products.

        Counted are the pairs of a query and a key that it sees, with d multiply-adds in each.
        """
        if self.segments is None:
            pairs = int((self.bounds.diff().long() ** 2).sum())
        else:
            pairs = causal_pairs(self.segments)
        return 4 * self.heads * self.angles[0].shape[-1] * pairs

    def call(self, layer: nn.Module, x: Tensor) -> Tensor:
        """Call a transformers layer, this part's or one like it, as the model calls it."""
        if self.segments is None:
            arguments = dict(cu_seqlens=self.bounds, max_seqlen=self.longest)
        else:
            arguments = dict(attention_mask=None, segments=self.segments)
        return layer(x, position_embeddings=self.angles, **arguments)


# --- parts ----------------------------------------------------------------------------------------


def meta_part(model: str, kind: str, training: str, work: Workload = WORK) -> Part:
    """A part in bf16 on the meta device, with stand-ins for what runs on CUDA."""
    return _part(_meta_model(model, training, torch.bfloat16), kind, work)


def real_part(
    model: str, kind: str, training: str, device: str, dtype: torch.dtype, work: Workload = WORK
) -> Part:
    """A part with random numbers on a real device, with peft's and bitsandbytes' layers."""
    settings = TRAINING[training]
    meta = _part(_meta_model(model, "all weights", dtype), kind, work)
    layer = copy.deepcopy(meta.layer).to_empty(device=device)
    with torch.no_grad():
        for name, parameter in layer.named_parameters():
            mean = 1.0 if "norm" in name and name.endswith("weight") else 0.0
            parameter.normal_(mean, 0.02)
    set_attention(layer, TEXT_NAME if kind == TEXT else VISION_NAME)
    if settings.lora:
        layer.requires_grad_(False)
        if kind == TEXT:
            layer = _adapted(layer, settings, device)

    meta.layer = layer
    meta.x = torch.randn(meta.x.shape, device=device, dtype=dtype)
    half = torch.rand(*meta.angles[0].shape[:-1], meta.angles[0].shape[-1] // 2, device=device)
    turned = torch.cat([half, half], dim=-1) * 6
    meta.angles = tuple(x.to(meta.angles[0].dtype) for x in (turned.cos(), turned.sin()))
    meta.segments = meta.segments and meta.segments.to(device)
    meta.bounds = None if meta.bounds is None else meta.bounds.to(device)
    return meta


def _meta_model(model: str, training: str, dtype: torch.dtype) -> MetaModel:
    return meta_model(TRAINING[training], MODELS[model](), dtype, "cuda")


def _part(model: MetaModel, kind: str, work: Workload) -> Part:
    def empty(*shape: int, dtype: torch.dtype = model.dtype) -> Tensor:
        return torch.empty(shape, dtype=dtype, device="meta")

    if kind == TEXT:
        (batch,) = work.packs(sum(work.prompts) + sum(work.completions))
        segments = batch.segments
        x = empty(1, segments.num_tokens, model.width)
        angles = tuple(empty(1, segments.num_tokens, model.head_dim) for _ in range(2))
        heads = model.text.config.num_attention_heads
        return Part(model.text.layers[0], x, angles, segments, None, 0, heads)

    lengths = work.patches
    if getattr(model.vision.config, "fullatt_block_indexes", None):
        lengths = [WINDOW] * (sum(lengths) // WINDOW)
    patches = sum(lengths)
    x, block = empty(patches, model.vision_width), model.vision.blocks[0]
    angles = tuple(empty(patches, model.vision_head_dim, dtype=torch.float32) for _ in range(2))
    heads = model.vision.config.num_heads
    return Part(block, x, angles, None, cumulative(lengths), max(lengths), heads)


def set_attention(layer: nn.Module, name: str) -> None:
    """Let a layer of its own call the attention that transformers knows by this name."""
    attention = layer.self_attn if hasattr(layer, "self_attn") else layer.attn
    attention.config._attn_implementation = name


def _adapted(layer: nn.Module, settings: ModelConfig, device: str) -> nn.Module:
    """A frozen text layer with peft's adapters, over linear layers in 4 bits if asked for.

    Adapters get random numbers throughout; peft's own begin with zeros, and so with no gradients.
    """
    if settings.load_in_4bit:
        from bitsandbytes.nn import Linear4bit, Params4bit

        for module in list(layer.modules()):
            for name, child in module.named_children():
                if type(child) is nn.Linear:
                    size = child.in_features, child.out_features
                    linear = Linear4bit(
                        *size,
                        bias=child.bias is not None,
                        compute_dtype=child.weight.dtype,
                        quant_type="nf4",
                    )
                    linear.bias = child.bias
                    linear.weight = Params4bit(
                        child.weight.data, requires_grad=False, quant_type="nf4"
                    )
                    setattr(module, name, linear.to(device))
    holder = nn.Module()
    holder.config, holder.language_model = Qwen2_5_VLConfig(), layer
    layer = with_lora(holder, settings).get_base_model().language_model
    with torch.no_grad():
        for parameter in layer.parameters():
            if parameter.requires_grad:
                parameter.normal_(0.0, 0.02)
    return layer
