"""What is loaded, and what `make_policy` prepares: weights that train, layers that run again."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

from mr1_fast.config import ModelConfig
from mr1_fast.errors import UserError
from mr1_fast.model.families import FAMILIES, text_model
from mr1_fast.model.forward import LayerRun
from mr1_fast.model.load import load_pretrained, make_policy

from ..data.models import gradients, tiny_policy
from .test_forward import packed_logprobs, weighted


@pytest.mark.parametrize("recompute", ["all", "none"])
@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_a_frozen_vision_tower_leaves_all_other_gradients_as_they_are(family, recompute):
    found = []
    for frozen in (False, True):
        policy = tiny_policy(family=family, freeze_vision=frozen, recompute=recompute)
        loss = weighted(packed_logprobs(policy))
        found.append((loss.detach(), gradients(policy, loss)))
    (loss, whole), (same, others) = found
    assert torch.equal(loss, same)
    assert others.keys() == {name for name in whole if ".visual." not in name} < whole.keys()
    assert all(torch.equal(gradient, whole[name]) for name, gradient in others.items())


def test_frozen_images_keep_nothing_for_a_backward_pass():
    policy = tiny_policy(freeze_vision=True, recompute="all")
    seen = []

    def watch(*_) -> None:
        seen.append(torch.is_grad_enabled())

    policy.model.model.visual.merger.register_forward_pre_hook(watch)
    packed_logprobs(policy)
    assert seen == [False]


@pytest.mark.parametrize(
    "settings, expected",
    [
        ({"recompute": "none"}, LayerRun()),
        ({"recompute": "auto"}, LayerRun(recompute_text=3, recompute_vision=2)),
        ({"recompute": "all"}, LayerRun(recompute_text=3, recompute_vision=2)),
        ({"recompute": "all", "lora": True}, LayerRun(recompute_text=3)),
        ({"recompute": "all", "freeze_vision": True}, LayerRun(recompute_text=3)),
        (
            {"recompute": "all", "fused_layers": False, "offload_checkpoints": True},
            LayerRun(False, recompute_text=3, recompute_vision=2, offload=True),
        ),
    ],
    ids=str,
)
def test_how_layers_are_computed(settings, expected):
    assert tiny_policy(**settings).layers == expected


# --- every family ---------------------------------------------------------------------------------


@pytest.fixture(scope="module", params=FAMILIES)
def saved(request, tmp_path_factory):
    """A tiny policy of a family, and the folder that it is saved in."""
    policy, folder = tiny_policy(family=request.param), tmp_path_factory.mktemp(request.param)
    policy.model.save_pretrained(folder)
    policy.processor.save_pretrained(folder, request.param)
    return policy, folder


def settings(folder, **others) -> ModelConfig:
    return ModelConfig(model=str(folder), device="cpu", recompute="none", **others)


def decoder_layers(policy) -> set[str]:
    """The full names of all linear layers of the decoder, as they are in the model."""
    decoder = next(n for n, m in policy.model.named_modules() if m is text_model(policy.model))
    modules = text_model(policy.model).layers.named_modules()
    return {f"{decoder}.layers.{name}" for name, m in modules if isinstance(m, nn.Linear)}


def test_it_loads_with_all_weights_tied_or_not(saved, tmp_path):
    policy, folder = saved
    model, processor = load_pretrained(settings(folder))
    assert type(model) is type(policy.model)
    expected = policy.model.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in model.state_dict().items())
    assert model.lm_head.weight is model.get_input_embeddings().weight
    assert type(processor) is type(policy.processor)

    shutil.copytree(folder, untied := tmp_path / "untied")
    config = json.loads((untied / "config.json").read_text())
    for part in (config, config.get("text_config", {})):
        part["tie_word_embeddings"] = False
    (untied / "config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"it has no weights for lm_head\.weight"):
        load_pretrained(settings(untied))
    weights = load_file(untied / "model.safetensors")
    weights["lm_head.weight"] = torch.randn(expected["lm_head.weight"].shape)
    save_file(weights, untied / "model.safetensors", metadata={"format": "pt"})
    model, _ = load_pretrained(settings(untied))
    assert torch.equal(model.lm_head.weight, weights["lm_head.weight"])


def test_adapters_are_on_the_decoders_linear_layers_alone(saved):
    pytest.importorskip("peft")
    policy, folder = saved
    adapted = make_policy(
        load_pretrained(settings(folder))[0],
        policy.processor,
        settings(folder, lora=True, lora_rank=4),
    )
    found = {
        name.removeprefix("base_model.model.")
        for name, module in adapted.model.named_modules()
        if hasattr(module, "lora_A")
    }
    assert found == decoder_layers(policy) and len(found) == 7 * 3


def test_4_bits_are_the_decoders_linear_layers_alone(saved):
    bitsandbytes = pytest.importorskip("bitsandbytes")
    policy, folder = saved
    model, _ = load_pretrained(settings(folder, load_in_4bit=True, dtype="float32"))
    small = {n for n, m in model.named_modules() if isinstance(m, bitsandbytes.nn.Linear4bit)}
    assert small == decoder_layers(policy)


@pytest.mark.parametrize("family", ["qwen2", "qwen3_vl"])
def test_an_embedding_may_have_more_rows_than_the_tokenizer_has_tokens(family, tmp_path):
    policy = tiny_policy(family=family)
    policy.processor.save_pretrained(tmp_path, family)
    for extra in (64, -128):
        tokens = len(policy.processor.tokenizer)
        policy.model.resize_token_embeddings(tokens + extra)
        policy.model.save_pretrained(tmp_path)
        if extra > 0:
            model, _ = load_pretrained(settings(tmp_path))
            assert len(model.lm_head.weight) == tokens + extra
        else:
            with pytest.raises(UserError, match="its tokenizer is not there, or not the model's"):
                load_pretrained(settings(tmp_path))


@pytest.mark.parametrize("family", ["qwen3", "qwen2_5_vl"])
@pytest.mark.parametrize(
    "missing, message",
    [
        ("chat_template.jinja", "has no chat template, .*: choose its Instruct version"),
        ("tokenizer.json", "its tokenizer is not there, or not the model's"),
    ],
)
def test_what_a_tokenizer_lacks_is_said_before_weights_are_read(family, missing, message, tmp_path):
    policy = tiny_policy(family=family)
    policy.processor.save_pretrained(tmp_path, family)
    policy.model.config.save_pretrained(tmp_path)
    (tmp_path / missing).unlink()
    with pytest.raises(UserError, match=message):
        load_pretrained(settings(tmp_path))
