"""Configurations of models that are planned for without a network, and of any other model by its name."""

from transformers import AutoConfig, PretrainedConfig, Qwen2VLConfig

from ..config import BUILT_IN
from ..errors import UserError
from ..hub import cache_only_without_hub
from .load import adapter_base, check_family

SIZES = {
    "2B": dict(
        hidden_size=1536,
        intermediate_size=8960,
        num_attention_heads=12,
        num_key_value_heads=2,
        vocab_size=151_936,
        tie_word_embeddings=True,
    ),
    "7B": dict(
        hidden_size=3584,
        intermediate_size=18_944,
        num_attention_heads=28,
        num_key_value_heads=4,
        vocab_size=152_064,
        tie_word_embeddings=False,
    ),
}
"""What Qwen2-VL's sizes differ in."""


def find_model_config(name: str) -> PretrainedConfig:
    """The configuration behind `--model`: built in, of a local folder, or from the hub; UserError where it is none."""
    if name in BUILT_IN:
        from .tiny import tiny_config, tiny_processor

        return tiny_config(tiny_processor(), name)
    size = name.removeprefix("Qwen/Qwen2-VL-").removesuffix("-Instruct")
    if name.startswith("Qwen/") and size in SIZES:
        return qwen2_vl(**SIZES[size])
    if base := adapter_base(name):
        return find_model_config(base)
    try:
        with cache_only_without_hub(name):
            config = AutoConfig.from_pretrained(name)
    except (
        Exception
    ) as error:  # no network, no such name, or a folder without a readable config.json
        hub = (f"Qwen/Qwen2-VL-{size}" for size in SIZES)
        raise UserError(
            f"model {name} has no configuration that can be read here: check the name and the network, pass a local "
            f"folder, or plan for one that is built in ({', '.join((*BUILT_IN, *hub))})."
        ) from error
    check_family(name, config.model_type)
    return config


def qwen2_vl(hidden_size: int, tie_word_embeddings: bool, **text) -> Qwen2VLConfig:
    """Qwen2-VL with its own depth of 28 decoder layers and 32 vision blocks of width 1280."""
    rope = {"rope_type": "default", "rope_theta": 1e6, "mrope_section": [16, 24, 24]}
    return Qwen2VLConfig(
        text_config=dict(
            hidden_size=hidden_size,
            num_hidden_layers=28,
            rope_parameters=rope,
            tie_word_embeddings=tie_word_embeddings,
            **text,
        ),
        vision_config=dict(
            depth=32, embed_dim=1280, hidden_size=hidden_size, num_heads=16, mlp_ratio=4
        ),
        tie_word_embeddings=tie_word_embeddings,
    )
