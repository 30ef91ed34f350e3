"""Qwen2 and Qwen2.5, text alone: biases of queries, keys and values."""

from transformers import Qwen2Config

from .family import Family
from .text_settings import built_in_text, published_text


def _published(*sizes, rope_theta: float = 1e6, **others) -> dict:
    return published_text(*sizes, rope=dict(rope_theta=rope_theta), **others)


_SIZE_1B5 = 1536, 8960, 28, 12, 2, True
_SIZE_7B = 3584, 18_944, 28, 28, 4, False
_MATH = dict(rope_theta=1e4, max_position_embeddings=4096)


QWEN2 = Family(
    model_type="qwen2",
    title="Qwen2.5",
    auto_class="AutoModelForCausalLM",
    config_class=Qwen2Config,
    sizes={
        "Qwen/Qwen2.5-0.5B": _published(896, 4864, 24, 14, 2, True),
        "Qwen/Qwen2.5-1.5B": _published(*_SIZE_1B5),
        "Qwen/Qwen2.5-3B": _published(2048, 11_008, 36, 16, 2, True),
        "Qwen/Qwen2.5-7B": _published(*_SIZE_7B, vocab_size=152_064),
        "Qwen/Qwen2.5-Math-1.5B": _published(*_SIZE_1B5, **_MATH),
        "Qwen/Qwen2.5-Math-7B": _published(*_SIZE_7B, vocab_size=152_064, **_MATH),
    },
    built_in=built_in_text,
)
"""The family."""
