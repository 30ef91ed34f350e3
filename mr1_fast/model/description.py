"""Reading a model's configuration, which says whether it can be trained, before anything else."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import AutoConfig, PretrainedConfig

from ..errors import UserError
from .families import FAMILIES, titles, unknown_type
from .model_files import check_files
from .sizes import check_relations, check_sizes

LINEAR_ATTENTION, LINEAR_ATTENTION_TYPES = "linear_num_value_heads", ("qwen3_5", "qwen3_next")
"""A setting that models with GatedDeltaNet layers have, and what their types begin with."""
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
"""Settings that mixtures of experts have."""
ROPE_TYPES = ("default", "linear", "yarn", "llama3")
"""Types of rotary angles that depend on a token's own position alone."""
LONGEST_NAME = 60
"""The most characters of a model type that a message shows."""


def check_supported(name: str, settings: Mapping[str, Any]) -> None:
    """Raise UserError unless the model `name`, with these settings in its config.json, is of a
    family here; nothing but those settings need be at hand."""
    model_type = str(settings.get("model_type"))[:LONGEST_NAME]
    if model_type in FAMILIES:
        return
    known = titles()
    of_text = settings.get("text_config")
    text = of_text if isinstance(of_text, Mapping) else settings
    if text.get(LINEAR_ATTENTION) or model_type.startswith(LINEAR_ATTENTION_TYPES):
        raise UserError(
            f"model {name} has the model type {model_type}, with GatedDeltaNet layers, which "
            "mr1_fast does not train yet, since their state runs through all tokens before, so "
            f"that completions cannot share a prompt in a pack: choose one of {known}."
        )
    if any(text.get(key) for key in EXPERTS) or model_type.endswith("_moe"):
        raise UserError(
            f"model {name} has the model type {model_type}, a mixture of experts, but mr1_fast "
            f"trains dense models alone: choose one of {known}."
        )
    raise unknown_type(f"model {name}", model_type)


def check_layers(name: str, config: PretrainedConfig) -> None:
    """Raise UserError where a model of a family computes what training or the rollout would not."""
    text = config.get_text_config()
    if windows := set(getattr(text, "layer_types", None) or ()) - {"full_attention"}:
        way_out = "choose a model without it"
        if windows == {"sliding_attention"}:
            way_out = (
                "set use_sliding_window to false in its config.json and remove layer_types, or "
                "choose a model without a window"
            )
        raise UserError(
            f"model {name} has layers with {min(windows)}, but mr1_fast attends to all tokens "
            f"before: {way_out}."
        )
    rope = (text.rope_parameters or {}).get("rope_type", "default")
    if rope not in ROPE_TYPES:
        raise UserError(
            f"model {name} has rotary angles of type {rope}, which depend on the longest sequence "
            "beside a token, and packs have several: set rope_type in its config.json to "
            f"{' or '.join(ROPE_TYPES)}, or choose another model."
        )
    if text.hidden_act != "silu":
        raise UserError(
            f"model {name} has the activation {text.hidden_act}, but mr1_fast samples from models "
            "with silu alone: choose another model."
        )
    if getattr(text, "attention_dropout", 0):
        raise UserError(
            f"model {name} has attention_dropout = {text.attention_dropout}, which mr1_fast does "
            "not compute: set it to 0 in its config.json."
        )


def check_weights(name: str, config: PretrainedConfig) -> None:
    """Raise UserError for a model whose files hold quantised weights that cannot be trained."""
    quantised = getattr(config, "quantization_config", None)
    if not quantised:
        return
    method = quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised
    if method is None and (quantised.get("load_in_4bit") or quantised.get("load_in_8bit")):
        method = "bitsandbytes"  # as transformers reads files that do not name it
    if method != "bitsandbytes":
        raise UserError(
            f"the files of model {name} hold weights quantised by {str(method)[:LONGEST_NAME]}: "
            "choose the 16-bit model, and pass --lora true --load-in-4bit true for 4 bits."
        )


def read_description(name: str | Path, shown: str | None = None) -> PretrainedConfig:
    """Read the configuration of a model in a local folder or on the hub.

    shown: what messages call the model, by default `name`. Raises UserError for a model that cannot
    be trained, also where transformers does not know its type or the file does not name it, and
    OSError where no configuration can be read.
    """
    shown = shown or str(name)
    check_files(name)
    try:
        settings, _ = PretrainedConfig.get_config_dict(name)
    except TypeError:  # older versions of transformers look into what is no mapping
        settings = None
    if not isinstance(settings, Mapping) or not isinstance(settings.get("model_type"), str):
        raise UserError(
            f"model {shown} has no config.json that names a model_type: copy the original "
            "config.json of the model into its folder."
        )
    check_supported(shown, settings)
    check_sizes(shown, settings)
    config = AutoConfig.from_pretrained(name, trust_remote_code=False)
    # The file may name attention that is not installed, or that would come from the hub as code;
    # ours is set once the model is there.
    config._attn_implementation = "sdpa"
    check_layers(shown, config)
    check_relations(shown, config)
    return config
