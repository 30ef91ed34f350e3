"""The families of models that can be trained: one file for each, and where its parts are."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import transformers
from torch import Tensor, nn
from transformers import PretrainedConfig

from ...errors import UserError
from .family import BuiltInSize, Family, TokenIds, VisionTower, mlp_width
from .qwen2 import QWEN2
from .qwen2_5_vl import QWEN2_5_VL
from .qwen2_vl import QWEN2_VL
from .qwen3 import QWEN3
from .qwen3_vl import DEEPSTACK_MERGERS, QWEN3_VL

__all__ = [
    "DEEPSTACK_MERGERS",
    "FAMILIES",
    "BuiltInSize",
    "Family",
    "TokenIds",
    "VisionTower",
    "auto_class",
    "banned_tokens",
    "base_model",
    "check_layers",
    "check_supported",
    "deepstack_blocks",
    "deepstack_mergers",
    "family_of",
    "lora_layers",
    "mlp_width",
    "patches_per_token",
    "pixels_per_token",
    "text_model",
    "text_positions",
    "unquantised",
    "vision_tower",
]

FAMILIES = {family.model_type: family for family in (QWEN2_VL, QWEN2_5_VL, QWEN3_VL, QWEN2, QWEN3)}
"""The families by the `model_type` of transformers."""

LINEAR_ATTENTION, LINEAR_ATTENTION_TYPES = "linear_num_value_heads", ("qwen3_5", "qwen3_next")
"""A setting that models with GatedDeltaNet layers have, and what their types begin with."""
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Settings that mixtures of experts have."""
LONGEST_NAME = 60
"""The most characters of a model type that a message shows."""


def check_supported(name: str, settings: Mapping[str, Any]) -> None:
    """Raise UserError unless the model `name`, with these settings in its config.json, is of a
    family here; nothing but those settings need be at hand."""
    model_type = str(settings.get("model_type"))[:LONGEST_NAME]
    if model_type in FAMILIES:
        return
    titles = [family.title for family in FAMILIES.values()]
    known = f"{', '.join(titles[:-1])} and {titles[-1]}"
    of_text = settings.get("text_config")
    text = of_text if isinstance(of_text, Mapping) else settings
    if text.get(LINEAR_ATTENTION) or model_type.startswith(LINEAR_ATTENTION_TYPES):
        raise UserError(
            f"model {name} is a {model_type}, with GatedDeltaNet layers, whose state runs through "
            "all tokens before, so that prompts cannot be shared in a pack as attention shares "
            f"them: mr1_fast does not train it yet, but {known}."
        )
    if any(text.get(key) for key in EXPERTS) or model_type.endswith("_moe"):
        raise UserError(
            f"model {name} is a {model_type}, a mixture of experts, but mr1_fast trains dense "
            f"models alone: choose one of {known}."
        )
    raise UserError(
        f"model {name} is a {model_type}, but mr1_fast trains {known}: choose one of these."
    )


def check_layers(name: str, config: PretrainedConfig) -> None:
    """Raise UserError where a layer of a family's model does not attend to all tokens before."""
    kinds = set(getattr(config.get_text_config(), "layer_types", None) or ())
    if kinds - {"full_attention"}:
        raise UserError(
            f"model {name} has layers with {min(kinds - {'full_attention'})}, but mr1_fast attends "
            "to all tokens before: set use_sliding_window to false in its config.json and remove "
            "layer_types, or choose a model without a window."
        )


def family_of(config: PretrainedConfig) -> Family:
    """Return the family of a model's configuration."""
    return FAMILIES[config.model_type]


def auto_class(config: PretrainedConfig) -> type:
    """Return the class of transformers that makes and loads models of this configuration."""
    return getattr(transformers, family_of(config).auto_class)


def base_model(model: nn.Module) -> nn.Module:
    """Return the model of transformers, with its LM head, under a PEFT wrapper, or itself."""
    return model.get_base_model() if hasattr(model, "get_base_model") else model


def text_model(model: nn.Module) -> nn.Module:
    """Return the decoder of a model: `embed_tokens`, `layers`, `norm` and `rotary_emb`."""
    base = base_model(model)
    return base.get_submodule(family_of(base.config).text)


def vision_tower(model: nn.Module) -> nn.Module | None:
    """Return the vision tower of a model: `patch_embed`, `blocks`, `merger`; None without one."""
    base = base_model(model)
    return base.model.visual if family_of(base.config).vision else None


def deepstack_mergers(tower: nn.Module) -> list[nn.Module]:
    """Return the mergers of a vision tower's deepstack features, none for most towers.

    The i-th feature is added to the hidden states of the image tokens after decoder layer i.
    """
    return list(getattr(tower, DEEPSTACK_MERGERS, ()))


def deepstack_blocks(vision: PretrainedConfig) -> list[int]:
    """Return the indexes of the blocks of a vision tower that a deepstack merger follows."""
    return list(getattr(vision, "deepstack_visual_indexes", ()))


def banned_tokens(config: PretrainedConfig) -> tuple[int, ...]:
    """Return the ids that are never sampled, since the next forward could not read them.

    A placeholder of an image or a video asks for a feature that does not exist.
    """
    if family_of(config).vision is None:
        return ()
    return config.image_token_id, config.video_token_id


def lora_layers(config: PretrainedConfig) -> str:
    """Return a regular expression of the full names of the linear layers that get adapters.

    They are all of the decoder's layers.
    """
    _, _, decoder = family_of(config).text.rpartition(".")
    where = "layers" if decoder == "model" else decoder
    return rf".*{where}.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"


def unquantised(config: PretrainedConfig) -> list[str]:
    """Return the parts of a model that stay in 16 bits where its weights are loaded in 4 bits.

    They are the head and the vision tower, which is small, and whose errors reach every token.
    """
    return ["lm_head", *(["model.visual"] if family_of(config).vision else [])]


def text_positions(text: nn.Module, positions: Tensor) -> Tensor:
    """Return positions (3, T) as a decoder's rotary embedding takes them for one row.

    That is (3, 1, T) for M-RoPE's three axes, and (1, T) for a model of text alone, whose axes are
    all the same.
    """
    has_one_axis = text.config.model_type in FAMILIES
    return positions[:1] if has_one_axis else positions.unsqueeze(1)


def patches_per_token(config: PretrainedConfig) -> int:
    """Return how many image patches become one token; 0 for a model of text alone."""
    if family_of(config).vision is None:
        return 0
    return config.vision_config.spatial_merge_size**2


def pixels_per_token(config: PretrainedConfig) -> int:
    """Return how many pixels of an image become one token; 0 for a model of text alone."""
    if family_of(config).vision is None:
        return 0
    return patches_per_token(config) * config.vision_config.patch_size**2
