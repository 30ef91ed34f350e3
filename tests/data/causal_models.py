"""Every causal language model of transformers, tiny, where its configuration can be made so."""

import torch
import transformers
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

V = 99
WIDTHS = (
    "hidden_size", "d_model", "n_embd", "dim", "embed_dim", "word_embed_proj_dim",
    "embedding_size", "emb_dim",
)  # fmt: skip
MLPS = (
    "intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "d_inner", "n_inner",
    "moe_intermediate_size", "shared_expert_intermediate_size",
)  # fmt: skip
LAYERS = (
    "num_hidden_layers", "n_layer", "num_layers", "n_layers", "decoder_layers", "encoder_layers",
    "depth",
)  # fmt: skip
HEADS = (
    "num_attention_heads", "n_head", "n_heads", "num_heads", "decoder_attention_heads",
    "encoder_attention_heads", "attention_heads",
)  # fmt: skip
EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
TOKENS = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
LARGEST = 5_000_000
"""Parameters above which a model is not made."""


def sizes(layers: int, heads: bool) -> dict:
    """Values for a configuration's fields; `heads` sets the size of heads, too."""
    values = {"vocab_size": V, "num_experts_per_tok": 2, "rotary_dim": 4, "is_decoder": True}
    for names, value in ((WIDTHS, 32), (MLPS, 48), (LAYERS, layers), (HEADS, 4), (EXPERTS, 4)):
        values |= dict.fromkeys(names, value)
    return values | ({"head_dim": 8, "num_key_value_heads": 2} if heads else {})


ATTEMPTS = [sizes(2, True), sizes(2, False), sizes(4, True), sizes(4, False)]


def names() -> list[tuple[str, str]]:
    """The model types with the names of their classes, text and vision."""
    found = {}
    for mapping in (MODEL_FOR_CAUSAL_LM_MAPPING_NAMES, MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES):
        for model_type, name in mapping.items():
            found[model_type, name[0] if isinstance(name, tuple) else name] = None
    return list(found)


def tiny_model(model_type: str, name: str) -> torch.nn.Module | None:
    """A model with random weights that answers a batch of token ids; None if no attempt is one."""
    for values in ATTEMPTS:
        try:
            config = _config(CONFIG_MAPPING[model_type], values)
            kind = getattr(transformers, name)
            with torch.device("meta"):
                if sum(p.numel() for p in kind(config).parameters()) > LARGEST:
                    continue
            torch.manual_seed(0)
            model = kind(config).float().eval()
            with torch.no_grad():
                for parameter in model.parameters():
                    parameter.add_(0.1 * torch.randn_like(parameter))
                model(input_ids=torch.tensor([[5, 6, 7]]), use_cache=False).logits  # noqa: B018
        except Exception:
            continue
        return model
    return None


def _config(kind: type, values: dict):
    default, chosen = kind(), {}
    for name, value in values.items():
        known = isinstance(getattr(default, name, None), int) or name == "head_dim"
        if known and hasattr(default, name) and name not in getattr(kind, "attribute_map", {}):
            chosen[name] = value
    for name in default.to_dict():
        if name.endswith("token_id") and isinstance(getattr(default, name, None), int):
            chosen[name] = TOKENS.get(name, 3)
    for name in getattr(kind, "sub_configs", {}):
        if (part := getattr(default, name, None)) is not None:
            chosen[name] = _config(type(part), values).to_dict()
    return kind(**chosen)
