"""A model that cannot be trained is one sentence, before anything but its config.json is read."""

import json

import pytest
from huggingface_hub import constants
from transformers import LlamaConfig, LlamaForCausalLM, Qwen3Config, Qwen3ForCausalLM

from mr1_fast.config import ModelConfig
from mr1_fast.errors import UserError
from mr1_fast.model.attention import use_packed_attention
from mr1_fast.model.known import find_model_config
from mr1_fast.model.load import load_pretrained, load_processor

from ..data.hub_server import TOKEN, hub_server

LINEAR = {"linear_num_value_heads": 32, "layer_types": ["linear_attention", "full_attention"]}
WINDOW = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}
SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2}
KNOWN = "Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen2.5 and Qwen3"
DELTA = f"with GatedDeltaNet layers, .*: choose one of {KNOWN}"
REFUSED = {
    "Qwen3.5": ({"model_type": "qwen3_5", "text_config": LINEAR}, DELTA),
    "Qwen3.5 of experts": ({"model_type": "qwen3_5_moe"}, DELTA),
    "Qwen3-Next": ({"model_type": "qwen3_next", **LINEAR, "num_experts": 8}, DELTA),
    "unheard of, linear": ({"model_type": "qwen9", "text_config": LINEAR}, DELTA),
    "Qwen3-VL of experts": ({"model_type": "qwen3_vl_moe"}, "type qwen3_vl_moe, a mixture of"),
    "Qwen3 of experts": ({"model_type": "qwen3_moe", "num_experts": 8}, "a mixture of experts"),
    "Qwen2 of experts": ({"model_type": "qwen2_moe"}, "a mixture of experts, but .* dense"),
    "unheard of, of experts": ({"model_type": "x", "n_routed_experts": 8}, "a mixture of experts"),
    "another family": ({"model_type": "llama"}, f"type llama, but mr1_fast trains {KNOWN}: choose"),
    "unheard of": ({"model_type": "x\x1b" + "y" * 999}, r"type x\\x1by{58}, but mr1_fast trains"),
    "Qwen2 with a window": ({"model_type": "qwen2", **SMALL, **WINDOW}, "with sliding_attention"),
    "Qwen3 with a window": ({"model_type": "qwen3", **SMALL, **WINDOW}, "with sliding_attention"),
    "Qwen2-VL with a window": (
        {"model_type": "qwen2_vl", "text_config": {**SMALL, **WINDOW}},
        "with sliding_attention",
    ),
    "angles by the longest sequence": (
        {"model_type": "qwen3", **SMALL, "rope_scaling": {"type": "dynamic", "factor": 2.0}},
        "rotary angles of type dynamic, .* set rope_type .* to default or linear",
    ),
    "another activation": (
        {"model_type": "qwen3", **SMALL, "hidden_act": "gelu"},
        "the activation gelu, .* choose another model",
    ),
    "a list": ([{"model_type": "qwen3"}], "no config.json that names a model_type: copy the orig"),
    "no type": (SMALL, "no config.json that names a model_type: copy the original config.json"),
    "a type that is none": ({"model_type": 3}, "no config.json that names a model_type"),
    "dropout": (
        {"model_type": "qwen2", **SMALL, "attention_dropout": 0.5},
        "attention_dropout = 0.5, .* set it to 0",
    ),
}


@pytest.mark.parametrize("settings, message", REFUSED.values(), ids=REFUSED)
def test_its_configuration_is_enough(settings, message, tmp_path):
    """The folder has nothing else, so that whatever looked further would find another fault."""
    (tmp_path / "config.json").write_text(json.dumps(settings))
    config = ModelConfig(model=str(tmp_path), device="cpu")
    for use in (load_pretrained, load_processor, lambda c: find_model_config(c.model)):
        with pytest.raises(UserError, match=message) as caught:
            use(config)
        assert str(caught.value).startswith(f"model {tmp_path} ") and str(caught.value)[-1] == "."


def test_quantised_files_are_refused(tmp_path):
    settings = {"model_type": "qwen3", **SMALL, "num_key_value_heads": 2}
    settings["quantization_config"] = {"quant_method": "fp8"}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    with pytest.raises(UserError, match="quantised by fp8: choose the 16-bit model"):
        find_model_config(str(tmp_path))


def test_a_model_that_is_given_is_checked_too():
    config = Qwen3Config(
        **SMALL, num_key_value_heads=2, intermediate_size=64, vocab_size=32,
        layer_types=["sliding_attention"] * 2,
    )  # fmt: skip
    with pytest.raises(UserError, match="layers with sliding_attention"):
        use_packed_attention(Qwen3ForCausalLM(config))
    with pytest.raises(
        UserError, match=f"the model has the model type llama, but mr1_fast trains {KNOWN}: choose"
    ):
        use_packed_attention(LlamaForCausalLM(LlamaConfig(**SMALL, vocab_size=32)))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """A Hub that this process asks for models."""
    with hub_server() as server:
        url = server.address + "/{repo_id}/resolve/{revision}/{filename}"
        monkeypatch.setattr(constants, "ENDPOINT", server.address)
        monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", url)
        monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield server


@pytest.mark.parametrize("kind", ["Qwen3.5", "Qwen3 of experts", "unheard of"])
def test_nothing_else_is_asked_of_the_hub(kind, hub):
    settings, message = REFUSED[kind]
    files = {"config.json": json.dumps(settings).encode(), "model.safetensors": b"{}"}
    hub.repos["me/model"] = [files]
    config = ModelConfig(model="me/model", device="cpu")
    for use in (load_pretrained, load_processor, lambda c: find_model_config(c.model)):
        with pytest.raises(UserError, match=message):
            use(config)
    assert hub.read and set(hub.read) == {"config.json"}
