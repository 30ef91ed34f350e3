"""The families of models that can be trained: one file for each, and where its parts are."""

from __future__ import annotations

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
    "deepstack_blocks",
    "deepstack_mergers",
    "family_of",
    "lora_layers",
    "mlp_width",
    "patches_per_token",
    "pixels_per_token",
    "text_model",
    "text_positions",
    "titles",
    "unknown_type",
    "unquantised",
    "vision_tower",
]

FAMILIES = {family.model_type: family for family in (QWEN2_VL, QWEN2_5_VL, QWEN3_VL, QWEN2, QWEN3)}
"""The families by the `model_type` of transformers."""
TEXT_TYPES = {family.model_type for family in FAMILIES.values() if family.vision is None}
"""Model types of the families of text alone, which are also those of their decoders."""


def family_of(config: PretrainedConfig) -> Family:
    """Return the family of a model's configuration; UserError if it is not one of these."""
    if config.model_type not in FAMILIES:
        raise unknown_type("the model", config.model_type)
    return FAMILIES[config.model_type]


def unknown_type(model: str, model_type: str) -> UserError:
    """Make the error for a model, as a sentence calls it, of a type that is of no family here."""
    return UserError(
        f"{model} has the model type {model_type}, but mr1_fast trains {titles()}: choose one of "
        "these."
    )


def titles() -> str:
    """Return the names of the families, as they are written in a sentence."""
    *others, last = [family.title for family in FAMILIES.values()]
    return f"{', '.join(others)} and {last}"


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
    family = family_of(base.config)
    return base.get_submodule(family.vision.place) if family.vision else None


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
    tower = family_of(config).vision
    return ["lm_head", *([tower.place] if tower else [])]


def text_positions(text: nn.Module, positions: Tensor) -> Tensor:
    """Return positions (3, T) as a decoder's rotary embedding takes them for one row.

    That is (3, 1, T) for M-RoPE's three axes, and (1, T) for a model of text alone, whose axes are
    all the same.
    """
    # The class tells it: a config.json may call the decoder of a model with images a qwen2, too.
    has_one_axis = type(text.config).model_type in TEXT_TYPES
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
