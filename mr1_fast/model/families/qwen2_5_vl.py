"""Qwen2.5-VL: Qwen2-VL with RMSNorm, a gated MLP and windowed attention in its vision tower."""

from transformers import Qwen2_5_VLConfig

from .family import BuiltInSize, Family, TokenIds, VisionTower
from .text_settings import (
    SHORTER_NAMES,
    built_in_text,
    image_ids,
    published_images,
    published_text,
    sections,
)

_TOWER = VisionTower("Qwen2_5_VLProcessor", 14, has_gated_mlp=True)


def _published(*sizes, **others) -> dict:
    rope = dict(rope_theta=1e6, mrope_section=[16, 24, 24])
    text = published_text(*sizes, rope=rope, **others)
    return published_images(
        text,
        depth=32,
        hidden_size=1280,
        intermediate_size=3420,
        num_heads=16,
        out_hidden_size=text["hidden_size"],
        window_size=112,
        fullatt_block_indexes=[7, 15, 23, 31],
        **_TOWER.patches(),
    )


def _built_in(size: BuiltInSize, ids: TokenIds) -> dict:
    return dict(
        text_config=built_in_text(size, ids, mrope_section=sections(size)),
        vision_config=dict(
            depth=size.vision_blocks,
            hidden_size=size.vision_width,
            out_hidden_size=size.hidden_size,
            intermediate_size=2 * size.vision_width,
            num_heads=size.heads,
            temporal_patch_size=2,
            window_size=56,
            fullatt_block_indexes=[size.vision_blocks - 1],
            **_TOWER.patches(),
        ),
        **image_ids(ids),
    )


QWEN2_5_VL = Family(
    model_type="qwen2_5_vl",
    title="Qwen2.5-VL",
    auto_class="AutoModelForImageTextToText",
    config_class=Qwen2_5_VLConfig,
    sizes={
        "Qwen/Qwen2.5-VL-3B": _published(2048, 11_008, 36, 16, 2, True),
        "Qwen/Qwen2.5-VL-7B": _published(3584, 18_944, 28, 28, 4, False, vocab_size=152_064),
    },
    built_in=_built_in,
    text="model.language_model",
    vision=_TOWER,
    stored_names=SHORTER_NAMES,
)
"""The family."""
