"""Qwen3, dense, text alone: norms of queries and keys, no biases."""

from transformers import Qwen3Config

from .family import BuiltInSize, Family, TokenIds
from .text_settings import built_in_text, published_text


def _published(*sizes) -> dict:
    return published_text(*sizes, rope=dict(rope_theta=1e6), head_dim=128)


def _built_in(size: BuiltInSize, ids: TokenIds) -> dict:
    return built_in_text(size, ids) | {"head_dim": size.head_dim}


QWEN3 = Family(
    model_type="qwen3",
    title="Qwen3",
    auto_class="AutoModelForCausalLM",
    config_class=Qwen3Config,
    sizes={
        "Qwen/Qwen3-0.6B": _published(1024, 3072, 28, 16, 8, True),
        "Qwen/Qwen3-1.7B": _published(2048, 6144, 28, 16, 8, True),
        "Qwen/Qwen3-4B": _published(2560, 9728, 36, 32, 8, True),
        "Qwen/Qwen3-8B": _published(4096, 12_288, 36, 32, 8, False),
    },
    built_in=_built_in,
)
"""The family."""
