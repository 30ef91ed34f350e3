"""A model without data, and the bytes that its parts were found to allocate.

Models and what was traced of them are kept: planning the same run with other settings, as advice
does many times, traces only what these settings change.
"""

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor, nn
from transformers import AutoModelForImageTextToText, PretrainedConfig

from ..config import ModelConfig
from ..model.forward import lm_head_weight
from ..model.patches import use_patch_projection
from ..model.reference import in_8_bits
from ..segments import Segments
from .layers import LayerBytes, Training, nbytes, trace
from .stand_ins import use_four_bits, use_lora, use_planned_attention

STORED = Training(recompute=False, offload=False)
"""How layers that are never recomputed train: everything that they need stays on the device."""


@dataclass(frozen=True)
class VisionBytes:
    """Bytes that the parts of the vision tower allocate on the images of one pack."""

    embedding: LayerBytes
    """The patch embedding."""
    blocks: LayerBytes
    """The transformer blocks."""
    merger: LayerBytes
    """The projection of 2 × 2 patches to one token."""


class MetaModel:
    """A `…ForConditionalGeneration` on torch's meta device, as it runs on `device`, cuda or cpu."""

    def __init__(self, model: nn.Module, device: str):
        self.model, self.device = model, device
        self.text, self.vision = model.model.language_model, model.model.visual
        head = lm_head_weight(model)
        self.vocabulary, self.width = head.shape
        self.dtype, self.itemsize, self.head_bytes = head.dtype, head.itemsize, head.nbytes
        self.trains_head = head.requires_grad
        self.is_tied = head is self.text.embed_tokens.weight
        self._traced: dict[tuple, LayerBytes] = {}

    @cached_property
    def weights(self) -> int:
        """Bytes of all weights and buffers."""
        return nbytes(self.model)

    @cached_property
    def trained(self) -> list[nn.Parameter]:
        """The parameters that the optimizer updates."""
        return [p for p in self.model.parameters() if p.requires_grad]

    @cached_property
    def gradients(self) -> int:
        """Bytes of the gradients of all trained parameters."""
        return sum(p.nbytes for p in self.trained)

    @property
    def head_dim(self) -> int:
        """Channels of one attention head of the language model."""
        return self.text.layers[0].self_attn.head_dim

    @property
    def vision_width(self) -> int:
        """Hidden size of the vision blocks."""
        return self.vision.patch_embed.proj.out_channels

    @property
    def vision_head_dim(self) -> int:
        """Channels of one attention head of the vision blocks."""
        return self.vision_width // self.vision.config.num_heads

    @property
    def patch_size(self) -> int:
        """Numbers of one image patch, 3 colours × 2 frames × 14 × 14."""
        return self.vision.patch_embed.proj.weight[0].numel()

    def hidden_bytes(self, tokens: int) -> int:
        """Bytes of the hidden states of so many tokens."""
        return tokens * self.width * self.itemsize

    def angle_bytes(self, patches: int) -> int:
        """Bytes of the vision tower's rotary cosines and sines, in fp32."""
        return 2 * patches * self.vision_head_dim * 4

    # --- traced parts -----------------------------------------------------------------------------

    def decoder(self, segments: Segments, training: Training | None = None) -> LayerBytes:
        """Bytes of the decoder layers on packed tokens."""
        x = self._empty(1, segments.num_tokens, self.width)
        angles = tuple(self._empty(1, segments.num_tokens, self.head_dim) for _ in range(2))

        def run(layer: nn.Module, x: Tensor) -> Tensor:
            return layer(x, attention_mask=None, position_embeddings=angles, segments=segments)

        bounds = (tuple(x.tolist()) for x in (segments.cu_seqlens_q, segments.cu_seqlens_k))
        key = ("decoder", *bounds)
        return self._trace(key, list(self.text.layers), x, run, training)

    def final_norm(self, tokens: int, rows: int, training: Training | None = None) -> LayerBytes:
        """Bytes of the final norm of packed tokens, and of the choice of the rows with loss."""
        chosen = torch.empty(rows, dtype=torch.int64, device="meta")

        def run(norm: nn.Module, x: Tensor) -> Tensor:
            return norm(x).index_select(0, chosen)

        x = self._empty(tokens, self.width)
        return self._trace(("norm", tokens, rows), [self.text.norm], x, run, training)

    def vision_tower(self, images: Tensor, training: Training | None = None) -> VisionBytes:
        """Bytes of the vision tower on images of so many patches each, (I,) int64."""
        patches, longest = int(images.sum()), int(images.max())
        bounds = torch.cat([images.new_zeros(1), images.cumsum(0)]).to(torch.int32)
        angles = tuple(
            self._empty(patches, self.vision_head_dim, dtype=torch.float32) for _ in range(2)
        )

        def run_block(block: nn.Module, x: Tensor) -> Tensor:
            return block(x, cu_seqlens=bounds, max_seqlen=longest, position_embeddings=angles)

        blocks = list(self.vision.blocks)
        if not any(p.requires_grad for p in blocks[0].parameters()):
            training = None
        stored = training and STORED
        pixels = self._empty(patches, self.patch_size, dtype=torch.float32)
        x = self._empty(patches, self.vision_width)
        embed, merger = self.vision.patch_embed, self.vision.merger
        return VisionBytes(
            self._trace(("embedding", patches), [embed], pixels, _call, stored),
            self._trace(("blocks", *images.tolist()), blocks, x, run_block, training),
            self._trace(("merger", patches), [merger], x, _call, stored),
        )

    def _empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device="meta")

    def _trace(
        self, name: tuple, layers: list, x: Tensor, call: Callable, training: Training | None
    ) -> LayerBytes:
        """Trace the bytes of layers once for each `name`, which says their kind and all shapes."""
        key = (name, training)
        if key not in self._traced:
            self._traced[key] = trace(layers, x, call, self.device, training)
        return self._traced[key]


def _call(module: nn.Module, x: Tensor) -> Tensor:
    return module(x)


def meta_model(
    config: ModelConfig,
    model_config: PretrainedConfig,
    dtype: torch.dtype,
    device: str,
    in_8_bits: bool = False,
) -> MetaModel:
    """The model of `config` as it is trained on a device type, cuda or cpu.

    It has its weights in `dtype` or in 4 bits, its adapters, and the trained parameters marked.
    With `in_8_bits` it is the frozen copy that `--reference 8bit` keeps.
    """
    settings = model_config.to_dict()
    settings.pop("quantization_config", None)  # 4 bits are this function's, not transformers'
    return _build(
        type(model_config),
        json.dumps(settings, default=str),
        config.lora_rank if config.lora else 0,
        config.load_in_4bit,
        in_8_bits,
        dtype,
        device,
    )


@lru_cache(maxsize=8)
def _build(
    config_class: type[PretrainedConfig],
    settings: str,
    lora_rank: int,
    in_4_bits: bool,
    as_8_bits: bool,
    dtype: torch.dtype,
    device: str,
) -> MetaModel:
    """`meta_model` by what it depends on; `settings` are the model configuration's as JSON."""
    model_config = config_class.from_dict(json.loads(settings))
    with torch.device("meta"):
        model = AutoModelForImageTextToText.from_config(model_config, dtype=dtype)
    use_planned_attention(model, device)
    use_patch_projection(model)
    if in_4_bits:
        use_four_bits(model)
    if lora_rank:
        use_lora(model, lora_rank)
    model.train()
    if as_8_bits:
        model = copy.deepcopy(model, in_8_bits(model)).requires_grad_(False)
    return MetaModel(model, device)
