"""Settings that the configurations of several families share."""

from collections.abc import Mapping
from typing import Any

from .family import BuiltInSize, TokenIds

SHORTER_NAMES = {"model.language_model.": "model.", "model.visual.": "visual."}
"""What the names of weights begin with in the files of Qwen2-VL and Qwen2.5-VL."""


def published_text(
    hidden: int,
    between: int,
    layers: int,
    heads: int,
    kv_heads: int,
    tied: bool,
    rope: Mapping[str, Any],
    **others,
) -> dict:
    """Return the settings of a published language model.

    hidden, between: width of the hidden states and of the MLP; tied: whether the LM head is the
    embedding; rope: settings of its rotary angles. The vocabulary is that of Qwen2 and Qwen3 unless
    `others` names another.
    """
    settings = dict(
        vocab_size=151_936,
        hidden_size=hidden,
        intermediate_size=between,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=kv_heads,
        tie_word_embeddings=tied,
        rope_parameters={"rope_type": "default", **rope},
    )
    return settings | others


def published_images(text: Mapping[str, Any], **vision) -> dict:
    """Return the settings of a published model with images, of a language model and a tower."""
    return dict(
        text_config=text, vision_config=vision, tie_word_embeddings=text["tie_word_embeddings"]
    )


def built_in_text(size: BuiltInSize, ids: TokenIds, **rope) -> dict:
    """Return the settings of a built-in language model; `rope` are further settings of it."""
    return dict(
        vocab_size=ids.vocabulary,
        hidden_size=size.hidden_size,
        intermediate_size=3 * size.hidden_size,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=2,
        max_position_embeddings=1024,
        rope_parameters={"rope_type": "default", "rope_theta": 10_000.0, **rope},
        bos_token_id=None,
        eos_token_id=ids.end,
        pad_token_id=ids.padding,
        tie_word_embeddings=True,
    )


def image_ids(ids: TokenIds) -> dict:
    """Return the settings of a built-in model with images that name its special tokens."""
    return dict(
        image_token_id=ids.image,
        video_token_id=ids.video,
        vision_start_token_id=ids.vision_start,
        vision_end_token_id=ids.vision_end,
        tie_word_embeddings=True,
    )


def sections(size: BuiltInSize) -> list[int]:
    """Return how many pairs of a head's channels turn with time, height and width: 2 : 3 : 3."""
    eighth = size.head_dim // 16
    return [2 * eighth, 3 * eighth, 3 * eighth]
