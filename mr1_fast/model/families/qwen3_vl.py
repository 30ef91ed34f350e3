"""Qwen3-VL, dense: interleaved M-RoPE, norms of queries and keys, deepstack features of images.

After some blocks of the vision tower, `deepstack_visual_indexes`, a merger of its own makes one
feature for each image token. The i-th of them is added to the hidden states of the image tokens
after decoder layer i (arXiv:2511.21631, section 2; arXiv:2406.04334).
"""

from transformers import Qwen3VLConfig

from .family import BuiltInSize, Family, TokenIds, VisionTower
from .text_settings import built_in_text, image_ids, published_images, published_text

_TOWER = VisionTower("Qwen3VLProcessor", 16)
DEEPSTACK_MERGERS = "deepstack_merger_list"
"""Where the vision tower has these mergers, in the order of the blocks that they follow."""


def _published(*sizes, depth: int, width: int, between: int, deepstack: list[int]) -> dict:
    text = published_text(
        *sizes,
        rope=dict(rope_theta=5e6, mrope_section=[24, 20, 20], mrope_interleaved=True),
        head_dim=128,
        max_position_embeddings=262_144,
    )
    return published_images(
        text,
        depth=depth,
        hidden_size=width,
        intermediate_size=between,
        num_heads=16,
        out_hidden_size=text["hidden_size"],
        deepstack_visual_indexes=deepstack,
        **_TOWER.patches(),
    )


def _built_in(size: BuiltInSize, ids: TokenIds) -> dict:
    pairs = size.head_dim // 2
    across = 5 * pairs // 16
    rope = dict(mrope_section=[pairs - 2 * across, across, across], mrope_interleaved=True)
    return dict(
        text_config=built_in_text(size, ids, **rope) | {"head_dim": size.head_dim},
        vision_config=dict(
            depth=size.vision_blocks,
            hidden_size=size.vision_width,
            intermediate_size=4 * size.vision_width,
            num_heads=size.heads,
            out_hidden_size=size.hidden_size,
            num_position_embeddings=64,
            deepstack_visual_indexes=list(range(size.vision_blocks)[:2]),
            **_TOWER.patches(),
        ),
        **image_ids(ids),
    )


_SMALL_TOWER = dict(depth=24, width=1024, between=4096, deepstack=[5, 11, 17])
_LARGE_TOWER = dict(depth=27, width=1152, between=4304, deepstack=[8, 16, 24])

QWEN3_VL = Family(
    model_type="qwen3_vl",
    title="Qwen3-VL",
    auto_class="AutoModelForImageTextToText",
    config_class=Qwen3VLConfig,
    sizes={
        "Qwen/Qwen3-VL-2B": _published(2048, 6144, 28, 16, 8, True, **_SMALL_TOWER),
        "Qwen/Qwen3-VL-4B": _published(2560, 9728, 36, 32, 8, True, **_SMALL_TOWER),
        "Qwen/Qwen3-VL-8B": _published(4096, 12_288, 36, 32, 8, False, **_LARGE_TOWER),
    },
    built_in=_built_in,
    text="model.language_model",
    vision=_TOWER,
)
"""The family."""
