"""Finding a model's configuration by its name, without its weights."""

from transformers import AutoConfig, PretrainedConfig, Qwen2VLConfig

from ..errors import UserError
from ..hub import model_access
from ..profiles import BUILT_IN
from .load import check_family
from .saved_adapter import adapter_base
from .tiny import tiny_config, tiny_processor

QWEN2_VL_SIZES = {
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
"""The settings in which Qwen2-VL's sizes differ, by the size's name on the hub."""


def find_model_config(name: str) -> PretrainedConfig:
    """Return the configuration behind `--model`: a built-in one, a local folder's, or the hub's.

    Raises UserError if there is none that can be read, or if its family cannot be trained.
    """
    if name in BUILT_IN:
        return tiny_config(tiny_processor(), name)
    size = name.removeprefix("Qwen/Qwen2-VL-").removesuffix("-Instruct")
    if name.startswith("Qwen/") and size in QWEN2_VL_SIZES:
        return qwen2_vl(**QWEN2_VL_SIZES[size])
    if base := adapter_base(name):
        return find_model_config(base)
    try:
        with model_access(name):
            config = AutoConfig.from_pretrained(name)
    except Exception as error:  # no network, no such name, or a folder without a config.json
        known = (*BUILT_IN, *(f"Qwen/Qwen2-VL-{size}" for size in QWEN2_VL_SIZES))
        raise UserError(
            f"model {name} has no configuration that can be read here: check the name and the "
            f"network, pass a local folder, or plan for one that is built in ({', '.join(known)})."
        ) from error
    check_family(name, config.model_type)
    return config


def qwen2_vl(hidden_size: int, tie_word_embeddings: bool, **text) -> Qwen2VLConfig:
    """Return a Qwen2-VL configuration of any width, with the published depth.

    That is 28 decoder layers and 32 vision blocks of width 1280. `text` are further settings of the
    language model.
    """
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
