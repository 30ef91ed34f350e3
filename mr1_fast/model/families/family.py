"""What differs between families of models, as one description for each.

A family is one `model_type` of transformers. All of them are pre-norm decoders with rotary
positions, grouped queries and a gated MLP; some have a vision tower, whose features take the place
of image tokens. What the modules of a layer are, the code that runs them sees for itself.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

from transformers import PretrainedConfig


@dataclass(frozen=True)
class TokenIds:
    """Token ids that the configuration of a built-in model names."""

    vocabulary: int
    """Number of tokens."""
    end: int
    """What ends an answer."""
    padding: int
    image: int
    video: int
    vision_start: int
    vision_end: int


@dataclass(frozen=True)
class BuiltInSize:
    """The size of a built-in model."""

    hidden_size: int
    layers: int
    """Number of decoder layers."""
    heads: int
    """Number of attention heads, both of the language model and of the vision tower."""
    vision_width: int
    vision_blocks: int

    @property
    def head_dim(self) -> int:
        """Channels of an attention head."""
        return self.hidden_size // self.heads


@dataclass(frozen=True)
class VisionTower:
    """What differs between vision towers: how their configurations name what they have."""

    processor: str
    """The class of transformers that prepares images and text for the model."""
    patch_size: int
    """Pixels along each side of a patch, in published and in built-in models."""
    merge_size: int = 2
    """Patches along each side of an image token."""
    place: str = "model.visual"
    """Where a model has it."""
    width: str = "hidden_size"
    """The setting that is the hidden size of the blocks."""
    out_width: str = "out_hidden_size"
    """The setting that is the width of an image token's feature."""
    has_gated_mlp: bool = False
    """Whether the MLP of a block is silu(gate) · up, else it is a layer, an activation, a layer."""

    def patches(self) -> dict[str, int]:
        """Return the settings of published and built-in models that say what a patch is."""
        return dict(patch_size=self.patch_size, spatial_merge_size=self.merge_size)


@dataclass(frozen=True)
class Family:
    """A family of models."""

    model_type: str
    """Its name in transformers."""
    title: str
    """Its name among people."""
    auto_class: str
    """The class of transformers that loads its models, such as AutoModelForCausalLM."""
    config_class: type[PretrainedConfig]
    sizes: Mapping[str, Mapping]
    """The settings of published models, by their names on the hub without what follows the size,
    such as `-Instruct`."""
    built_in: Callable[[BuiltInSize, TokenIds], Mapping]
    """Makes the settings of a built-in model."""
    text: str = "model"
    """Where a model has its decoder: embedding, layers, final norm and rotary angles."""
    vision: VisionTower | None = None
    """Its vision tower; None for models of text alone."""
    stored_names: Mapping[str, str] = field(default_factory=dict)
    """What the names of weights begin with in files, by what they begin with in a model, where the
    two differ."""

    def config(self, settings: Mapping) -> PretrainedConfig:
        """Make a configuration of the family."""
        return self.config_class(**settings)


def mlp_width(vision: PretrainedConfig, tower: VisionTower) -> int:
    """Return the width between the two layers of a vision block's MLP."""
    width = getattr(vision, tower.width)
    return getattr(vision, "intermediate_size", None) or int(width * vision.mlp_ratio)
