"""Numbers in a model's config.json, held against bounds before anything is made of their size.

transformers makes a list as long as the number of layers when it reads a configuration, and asks
for memory of the size that the file names: a folder from elsewhere may name any.
"""

import math
from collections.abc import Iterator, Mapping
from typing import Any

from transformers import PretrainedConfig

from ..errors import UserError, shortened
from .families import FAMILIES, VisionTower, deepstack_blocks, mlp_width

MOST = {
    "hidden_size": 2**17,
    "embed_dim": 2**17,
    "out_hidden_size": 2**17,
    "intermediate_size": 2**20,
    "num_hidden_layers": 1024,
    "depth": 1024,
    "num_attention_heads": 4096,
    "num_key_value_heads": 4096,
    "num_heads": 4096,
    "head_dim": 4096,
    "vocab_size": 2**22,
    "max_position_embeddings": 2**31,
    "num_position_embeddings": 2**22,
    "patch_size": 256,
    "spatial_merge_size": 16,
    "temporal_patch_size": 16,
    "in_channels": 16,
    "window_size": 2**16,
    "num_labels": 2**16,
}
"""The largest value of each size, far above that of any published model; the smallest is 1."""
OPTIONAL = ("head_dim", "num_key_value_heads")
"""Sizes that follow from others where they are null."""
POSITIVE = ("rope_theta", "mlp_ratio", "rms_norm_eps", "factor")
"""Numbers that are finite and above 0."""
DEEPEST = 8
"""The most levels of settings within settings; a configuration has three."""
ATTENTION = (None, "eager", "sdpa", "flash_attention_2", "flash_attention_3", "flex_attention")
"""Kinds of attention that transformers has itself; another name would be code on the hub."""


def check_sizes(name: str, settings: Mapping[str, Any]) -> None:
    """Raise UserError unless every size in the settings of a config.json is one that a model has.

    It needs no configuration of transformers, which must not be made of other sizes.
    """
    for key, value in _leaves(name, settings):
        if key in MOST:
            if value is None and key in OPTIONAL:
                continue
            if type(value) is not int or not 1 <= value <= MOST[key]:
                raise _wrong(name, key, value, f"a whole number from 1 to {MOST[key]}")
        elif key in POSITIVE and value is not None:
            is_number = isinstance(value, int | float) and not isinstance(value, bool)
            if not is_number or not math.isfinite(value) or value <= 0:
                raise _wrong(name, key, value, "a number above 0")
        elif key.endswith("attn_implementation") and value not in ATTENTION:
            raise _wrong(name, key, value, f"null or {', '.join(filter(None, ATTENTION))}")


def check_relations(name: str, config: PretrainedConfig) -> None:
    """Raise UserError for sizes that do not fit each other, as those of attention heads must."""
    text = config.get_text_config()
    heads, groups = text.num_attention_heads, getattr(text, "num_key_value_heads", None)
    if groups and heads % groups:
        raise _wrong(name, "num_key_value_heads", groups, f"a divisor of its {heads} heads")
    head = getattr(text, "head_dim", None)
    if not head:
        if text.hidden_size % heads:
            raise _wrong(name, "num_attention_heads", heads, "a divisor of its hidden_size")
        head = text.hidden_size // heads
    if head % 2:
        raise _wrong(name, "head_dim", head, "even")
    if tower := FAMILIES[config.model_type].vision:
        _check_images(name, config, tower, head // 2)


def _check_images(name: str, config: PretrainedConfig, tower: VisionTower, angles: int) -> None:
    """Raise UserError for settings of images that do not fit the tower, or each other.

    angles: how many rotary angles a head has.
    """
    vision, text = config.vision_config, config.get_text_config()
    width, heads = getattr(vision, tower.width), vision.num_heads
    if width % heads or width // heads % 2:
        raise _wrong(name, "num_heads", heads, f"a divisor of half of its {tower.width}")
    window = getattr(vision, "window_size", None)
    least = vision.patch_size * vision.spatial_merge_size
    if window is not None and window < least:
        raise _wrong(name, "window_size", window, f"at least {least}, the side of an image token")
    sections = (text.rope_parameters or {}).get("mrope_section")
    if sections is not None and not (
        isinstance(sections, list)
        and [type(each) for each in sections] == [int] * 3
        and min(sections) >= 0
        and sum(sections) == angles
    ):
        raise _wrong(name, "mrope_section", sections, f"three numbers that add up to {angles}")
    _check_deepstack(name, vision)


def _check_deepstack(name: str, vision: PretrainedConfig) -> None:
    """Raise UserError unless the blocks that mergers follow are blocks of the tower."""
    blocks = deepstack_blocks(vision)
    if len(blocks) > vision.depth or not all(each in range(vision.depth) for each in blocks):
        raise _wrong(name, "deepstack_visual_indexes", blocks, "some blocks of its tower")


def least_weights(config: PretrainedConfig) -> int:
    """Return a lower bound of the numbers in a model's weights: its large matrices alone."""
    text = config.get_text_config()
    width = text.hidden_size
    head = getattr(text, "head_dim", None) or width // text.num_attention_heads
    groups = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    attention = width * head * 2 * (text.num_attention_heads + groups)
    layer = attention + 3 * width * text.intermediate_size
    total = text.vocab_size * width + text.num_hidden_layers * layer
    tower = FAMILIES[config.model_type].vision
    return total + _least_of_tower(config.vision_config, tower) if tower else total


def _least_of_tower(vision: PretrainedConfig, tower: VisionTower) -> int:
    """Return a lower bound of the numbers in the weights of a vision tower."""
    width = getattr(vision, tower.width)
    block = 4 * width**2 + (3 if tower.has_gated_mlp else 2) * width * mlp_width(vision, tower)
    channels = getattr(vision, "in_channels", 3)
    patch = channels * vision.temporal_patch_size * vision.patch_size**2
    positions = getattr(vision, "num_position_embeddings", 0)
    joined = width * vision.spatial_merge_size**2
    merger = joined**2 + joined * getattr(vision, tower.out_width)
    mergers = 1 + len(deepstack_blocks(vision))
    return vision.depth * block + (patch + positions) * width + mergers * merger


def _leaves(name: str, settings: Mapping[str, Any], depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yield every setting with its value, also those of settings within settings."""
    if depth > DEEPEST:
        raise UserError(
            f"model {name} has settings nested deeper than {DEEPEST} levels in its config.json: "
            "copy the original config.json of the model into its folder."
        )
    for key, value in settings.items():
        yield key, value
        if isinstance(value, Mapping):
            yield from _leaves(name, value, depth + 1)


def _wrong(name: str, key: str, value: object, allowed: str) -> UserError:
    return UserError(
        f"model {name} has {key} = {shortened(value, 40)} in its config.json, which must be "
        f"{allowed}: copy the original config.json of the model into its folder."
    )
