"""Qwen2-VL: M-RoPE in sections, a vision tower with LayerNorm and quick GELU."""

from transformers import Qwen2VLConfig

from .family import BuiltInSize, Family, TokenIds, VisionTower
from .text_settings import (
    SHORTER_NAMES,
    built_in_text,
    image_ids,
    published_images,
    published_text,
    sections,
)

_TOWER = VisionTower("Qwen2VLProcessor", 14, width="embed_dim", out_width="hidden_size")


def _published(*sizes, **others) -> dict:
    rope = dict(rope_theta=1e6, mrope_section=[16, 24, 24])
    text = published_text(*sizes, rope=rope, **others)
    return published_images(
        text,
        depth=32,
        embed_dim=1280,
        hidden_size=text["hidden_size"],
        num_heads=16,
        mlp_ratio=4,
        **_TOWER.patches(),
    )


def _built_in(size: BuiltInSize, ids: TokenIds) -> dict:
    return dict(
        text_config=built_in_text(size, ids, mrope_section=sections(size)),
        vision_config=dict(
            depth=size.vision_blocks,
            embed_dim=size.vision_width,
            hidden_size=size.hidden_size,
            num_heads=size.heads,
            mlp_ratio=4,
            temporal_patch_size=2,
            in_channels=3,
            **_TOWER.patches(),
        ),
        **image_ids(ids),
    )


QWEN2_VL = Family(
    model_type="qwen2_vl",
    title="Qwen2-VL",
    auto_class="AutoModelForImageTextToText",
    config_class=Qwen2VLConfig,
    sizes={
        "Qwen/Qwen2-VL-2B": _published(1536, 8960, 28, 12, 2, True),
        "Qwen/Qwen2-VL-7B": _published(3584, 18_944, 28, 28, 4, False, vocab_size=152_064),
    },
    built_in=_built_in,
    text="model.language_model",
    vision=_TOWER,
    stored_names=SHORTER_NAMES,
)
"""The family."""
