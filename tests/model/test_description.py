"""A model that cannot be trained is one sentence, before anything but its config.json is read."""

import json

import pytest
from huggingface_hub import constants

from mr1_fast.config import ModelConfig
from mr1_fast.errors import UserError
from mr1_fast.model.known import find_model_config
from mr1_fast.model.load import load_pretrained, load_processor

from ..data.hub_server import TOKEN, hub_server

LINEAR = {"linear_num_value_heads": 32, "layer_types": ["linear_attention", "full_attention"]}
WINDOW = {"use_sliding_window": True, "sliding_window": 64, "max_window_layers": 1}
SMALL = {"num_hidden_layers": 2, "hidden_size": 64, "num_attention_heads": 2}
KNOWN = "Qwen2-VL, Qwen2.5-VL, Qwen3-VL, Qwen2.5 and Qwen3"
REFUSED = {
    "Qwen3.5": ({"model_type": "qwen3_5", "text_config": LINEAR}, "GatedDeltaNet"),
    "Qwen3.5 of experts": ({"model_type": "qwen3_5_moe"}, "GatedDeltaNet"),
    "Qwen3-Next": ({"model_type": "qwen3_next", **LINEAR, "num_experts": 8}, "GatedDeltaNet"),
    "unheard of, linear": ({"model_type": "qwen9", "text_config": LINEAR}, "GatedDeltaNet"),
    "Qwen3-VL of experts": ({"model_type": "qwen3_vl_moe"}, "a qwen3_vl_moe, a mixture of expe"),
    "Qwen3 of experts": ({"model_type": "qwen3_moe", "num_experts": 8}, "a mixture of experts"),
    "Qwen2 of experts": ({"model_type": "qwen2_moe"}, "a mixture of experts, but .* dense"),
    "unheard of, of experts": ({"model_type": "x", "n_routed_experts": 8}, "a mixture of experts"),
    "another family": ({"model_type": "llama"}, f"a llama, but mr1_fast trains {KNOWN}: choose"),
    "unheard of": ({"model_type": "x\x1b" + "y" * 999}, r"a x\\x1by{58}, but mr1_fast trains"),
    "Qwen2 with a window": ({"model_type": "qwen2", **SMALL, **WINDOW}, "with sliding_attention"),
    "Qwen3 with a window": ({"model_type": "qwen3", **SMALL, **WINDOW}, "with sliding_attention"),
    "Qwen2-VL with a window": (
        {"model_type": "qwen2_vl", "text_config": {**SMALL, **WINDOW}},
        "with sliding_attention",
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
