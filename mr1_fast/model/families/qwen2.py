"""Qwen2 and Qwen2.5, text alone: biases of queries, keys and values."""

from transformers import Qwen2Config

from .family import BuiltInSize, Family, TokenIds
from .text_settings import built_in_text, published_text


def _published(*sizes, **others) -> dict:
    rope = {"rope_type": "default", "rope_theta": 1e6}
    return published_text(*sizes, **others) | {"rope_parameters": rope}


def _built_in(size: BuiltInSize, ids: TokenIds) -> dict:
    return built_in_text(size, ids)


QWEN2 = Family(
    model_type="qwen2",
    title="Qwen2.5",
    auto_class="AutoModelForCausalLM",
    config_class=Qwen2Config,
    sizes={
        "Qwen/Qwen2.5-0.5B": _published(896, 4864, 24, 14, 2, True),
        "Qwen/Qwen2.5-1.5B": _published(1536, 8960, 28, 12, 2, True),
        "Qwen/Qwen2.5-3B": _published(2048, 11_008, 36, 16, 2, True),
        "Qwen/Qwen2.5-7B": _published(3584, 18_944, 28, 28, 4, False, vocab_size=152_064),
    },
    built_in=_built_in,
)
"""The family."""
