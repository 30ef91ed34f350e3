"""A model without data, and the bytes that its parts were found to allocate.

Models and what was traced of them are kept: planning the same run with other settings, as advice
does many times, traces only what these settings change.
"""

import copy
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, lru_cache

import torch
from torch import Tensor, nn
from transformers import PretrainedConfig

from ..config import ModelConfig
from ..model.families import (
    auto_class,
    deepstack_blocks,
    deepstack_mergers,
    patches_per_token,
    text_model,
    vision_tower,
)
from ..model.forward import (
    final_hidden,
    lm_head_weight,
    text_layer,
    trained_layers,
    trains_vision,
    vision_layer,
)
from ..model.joined_weights import join_weights
from ..model.layer_stream import layers
from ..model.patches import use_patch_projection
from ..model.recompute import Layer
from ..model.reference import in_8_bits
from ..model.vision import BlockCall
from ..segments import Segments
from .layers import STORED, LayerBytes, LayerStack, Training, nbytes, trace_layer, trace_part
from .stand_ins import PatchEmbedding, use_four_bits, use_lora, use_planned_attention
from .vision import Deepstack, VisionBytes


@dataclass(frozen=True)
class Recomputed:
    """Numbers of layers, the first ones, that are run again in the backward pass."""

    text: int
    """Of the text layers."""
    vision: int
    """Of the blocks of the vision tower."""


class MetaModel:
    """A model on torch's meta device, as it runs on `device`, cuda or cpu.

    fused: whether its layers are computed by fused operators, else by transformers' modules.
    """

    def __init__(self, model: nn.Module, device: str, fused: bool = True):
        self.model, self.device, self.fused = model, device, fused
        self.text, self.vision = text_model(model), vision_tower(model)
        head = lm_head_weight(model)
        self.vocabulary, self.width = head.shape
        self.dtype, self.itemsize, self.head_bytes = head.dtype, head.itemsize, head.nbytes
        self.trains_head = head.requires_grad
        self.is_tied = head is self.text.embed_tokens.weight
        self.trains_vision = trains_vision(model)
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
    def query_width(self) -> int:
        """Channels of all attention heads of the language model."""
        return self.text.config.num_attention_heads * self.head_dim

    @property
    def vision_width(self) -> int:
        """Hidden size of the vision blocks; 0, as below, without a vision tower."""
        return self.vision.patch_embed.proj.out_channels if self.vision else 0

    @property
    def vision_head_dim(self) -> int:
        """Channels of one attention head of the vision blocks."""
        return self.vision_width // self.vision.config.num_heads if self.vision else 0

    @property
    def patch_size(self) -> int:
        """Numbers of one image patch: colours × frames × height × width."""
        return self.vision.patch_embed.proj.weight[0].numel() if self.vision else 0

    @cached_property
    def layers(self) -> Recomputed:
        """How many layers can be run again; none of a vision tower that is not trained."""
        return Recomputed(*trained_layers(self.model))

    @cached_property
    def patch_work(self) -> float:
        """Multiplications of a patch in the vision blocks, by those of a token in the layers."""
        if self.vision is None:
            return 0.0

        def products(layers: nn.ModuleList) -> int:
            linears = (m for m in layers[0].modules() if isinstance(m, nn.Linear))
            return len(layers) * sum(m.in_features * m.out_features for m in linears)

        return products(self.vision.blocks) / products(self.text.layers)

    def hidden_bytes(self, tokens: int) -> int:
        """Bytes of the hidden states of so many tokens."""
        return tokens * self.width * self.itemsize

    def angle_bytes(self, patches: int) -> int:
        """Bytes of the vision tower's rotary cosines and sines, in fp32."""
        return 2 * patches * self.vision_head_dim * 4

    # --- traced parts -----------------------------------------------------------------------------

    def decoder(self, segments: Segments, training: Sequence[Training] = ()) -> LayerStack:
        """Bytes of the decoder layers on packed tokens.

        training: how layers train that keep their results, and how those that are run again; empty
        for a pass without gradients.
        """
        first, *_ = self.text.layers
        x = self._empty(segments.num_tokens, self.width)
        angles = tuple(self._empty(segments.num_tokens, self.head_dim) for _ in range(2))

        def make() -> Layer:
            return text_layer(first, angles, segments, self.fused)

        bounds = (tuple(x.tolist()) for x in (segments.cu_seqlens_q, segments.cu_seqlens_k))
        return self._stack(("decoder", *bounds), self.text.layers, make, x, training)

    def final_norm(self, tokens: int, rows: int, training: Training | None = None) -> LayerBytes:
        """Bytes of the final norm of packed tokens, and of the choice of the rows with loss."""
        chosen = torch.empty(rows, dtype=torch.int64, device="meta")
        x = self._empty(tokens, self.width)

        def run(residual: Tensor, update: Tensor | None = None) -> Tensor:
            return final_hidden(self.text, (residual, update), self.fused).index_select(0, chosen)

        carry = (x, x) if self.fused else (x,)
        return self._trace(
            ("norm", tokens, rows), trace_part, self.text.norm, run, carry, training=training
        )

    def vision_tower(self, images: Tensor, training: Sequence[Training] = ()) -> VisionBytes:
        """Bytes of the vision tower on images of so many patches each, (I,) int64.

        training: as for `decoder`.
        """
        patches, longest = int(images.sum()), int(images.max())
        bounds = torch.cat([images.new_zeros(1), images.cumsum(0)]).to(torch.int32)
        angles = tuple(
            self._empty(patches, self.vision_head_dim, dtype=torch.float32) for _ in range(2)
        )
        told = dict(cu_seqlens=bounds, max_seqlen=longest, position_embeddings=angles)
        call = BlockCall(self.vision.blocks[0], told)

        def make() -> Layer:
            return vision_layer(call, self.fused)

        if not self.trains_vision:
            training = ()
        ends = STORED if training else None
        pixels = self._empty(patches, self.patch_size, dtype=torch.float32)
        x = self._empty(patches, self.vision_width)
        embed, merger = PatchEmbedding(self.vision), self.vision.merger
        return VisionBytes(
            self._trace(
                ("embedding", patches), trace_part, embed, lambda: embed(pixels), (), training=ends
            ),
            self._stack(("blocks", *images.tolist()), self.vision.blocks, make, x, training),
            self._trace(("merger", patches), trace_part, merger, merger, (x,), training=ends),
            self._deepstack(x, ends),
            hidden=x.nbytes,
        )

    def _deepstack(self, x: Tensor, training: Training | None) -> Deepstack:
        """Bytes of the mergers of deepstack features, for hidden states x (P, D) of the tower."""
        mergers = deepstack_mergers(self.vision)
        if not mergers:
            return Deepstack.none()
        merger = mergers[0]
        return Deepstack(
            after=tuple(1 + index for index in deepstack_blocks(self.vision.config)),
            merger=self._trace(
                ("deepstack", len(x)), trace_part, merger, merger, (x,), training=training
            ),
            feature=self.hidden_bytes(len(x) // patches_per_token(self.model.config)),
            shared=x.nbytes,
        )

    def _empty(self, *shape: int, dtype: torch.dtype | None = None) -> Tensor:
        return torch.empty(shape, dtype=dtype or self.dtype, device="meta")

    def _stack(
        self,
        name: tuple,
        modules: nn.ModuleList,
        make: Callable[[], Layer],
        x: Tensor,
        training: Sequence[Training],
    ) -> LayerStack:
        """Trace the first of equal modules, as `make` makes a layer of it, in each way to train."""
        ways = [
            self._trace(name, trace_layer, modules[0], make, x, training=way)
            for way in training or (None,)
        ]
        return LayerStack(len(modules), ways[0], ways[-1])

    def _trace(self, name: tuple, trace: Callable, *what, training) -> LayerBytes:
        """Trace once for each `name`, which says the kind of a part and all shapes."""
        key = (name, training)
        if key not in self._traced:
            self._traced[key] = trace(*what, self.device, training)
        return self._traced[key]


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
        config.fused_layers,
        config.freeze_vision and not config.lora,
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
    fused: bool,
    frozen_vision: bool,
) -> MetaModel:
    """`meta_model` by what it depends on; `settings` are the model configuration's as JSON."""
    model_config = config_class.from_dict(json.loads(settings))
    with torch.device("meta"):
        model = auto_class(model_config).from_config(model_config, dtype=dtype)
    use_planned_attention(model, device)
    use_patch_projection(model)
    if tower := vision_tower(model):
        tower.requires_grad_(not frozen_vision)
    if in_4_bits:
        use_four_bits(model)
    if lora_rank:
        use_lora(model, lora_rank)
    if fused:
        join_weights(layers(model))
    model.train()
    if as_8_bits:
        model = copy.deepcopy(model, in_8_bits(model)).requires_grad_(False)
    return MetaModel(model, device, fused)
