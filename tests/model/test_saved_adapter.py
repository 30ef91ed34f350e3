"""Adapters on disk: what they say of the model under them, and what is said where none fits."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from mr1_fast.errors import UserError
from mr1_fast.model.families import base_model
from mr1_fast.model.families.text_settings import SHORTER_NAMES
from mr1_fast.model.load import load_pretrained
from mr1_fast.model.save import save_pretrained

from .test_save import adapted, logits, settings

peft = pytest.importorskip("peft")


def test_an_adapters_model_is_named_so_that_it_is_found_from_anywhere(
    tiny_folder, tmp_path, monkeypatch
):
    monkeypatch.chdir(tiny_folder.parent)
    save_pretrained(adapted(Path(tiny_folder.name)), tmp_path, "adapter")
    written = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert written["base_model_name_or_path"] == str(tiny_folder)


def test_saving_an_adapter_does_not_ask_the_hub(tiny_folder, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(
        "peft.utils.save_and_load.check_file_exists_on_hf_hub", lambda *name: asked.append(name)
    )
    policy = adapted(tiny_folder)
    base_model(policy.model).name_or_path = "someone/model"
    save_pretrained(policy, tmp_path, "adapter")
    assert (tmp_path / "adapter" / "adapter_model.safetensors").exists() and not asked


def test_a_full_card_is_no_fault_of_the_adapter(tiny_folder, tmp_path, monkeypatch):
    def full(*args, **options):
        raise torch.OutOfMemoryError("no room")

    save_pretrained(adapted(tiny_folder), tmp_path, "adapter")
    monkeypatch.setattr("peft.PeftModel.from_pretrained", full)
    with pytest.raises(torch.OutOfMemoryError):
        load_pretrained(settings(tmp_path))


def test_an_adapter_whose_model_is_gone(tiny_folder, tmp_path):
    save_pretrained(adapted(tiny_folder), tmp_path, "adapter")
    config = tmp_path / "adapter" / "adapter_config.json"
    values = json.loads(config.read_text())
    for base, reason in (
        (str(tmp_path / "gone"), "which is not there: put it back"),
        (None, "does not name the model under it"),
    ):
        config.write_text(json.dumps({**values, "base_model_name_or_path": base}))
        with pytest.raises(UserError, match=reason):
            load_pretrained(settings(tmp_path))
    config.write_text("{")
    with pytest.raises(UserError, match=r"adapter_config.json cannot be read"):
        load_pretrained(settings(tmp_path))
    config.write_text(json.dumps({**values, "r": 2}))
    with pytest.raises(UserError, match=r"does not fit its model .*size mismatch for"):
        load_pretrained(settings(tmp_path))


def on(model: Path, **options) -> torch.nn.Module:
    """PEFT's model of an adapter that has an effect, on the model in a folder."""
    peft_model = peft.get_peft_model(load_pretrained(settings(model))[0], lora(**options))
    for name, parameter in peft_model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return peft_model


def lora(**options) -> "peft.LoraConfig":
    return peft.LoraConfig(**{"target_modules": ["q_proj", "v_proj"], **options})


ADAPTERS = {
    "a rank above the width": {"r": 200},
    "a rank for some layers": {"rank_pattern": {"q_proj": 16}},
    "tokens of their own": {"trainable_token_indices": [10, 20]},
}


@pytest.mark.parametrize("options", ADAPTERS.values(), ids=ADAPTERS)
def test_an_adapter_that_peft_has_made(tiny_folder, tmp_path, options):
    made = on(tiny_folder, **options)
    made.save_pretrained(tmp_path)
    loaded, _ = load_pretrained(settings(tmp_path))
    torch.testing.assert_close(logits(loaded), logits(made.eval()))


def test_an_adapter_with_the_names_of_earlier_versions(tiny_folder, tmp_path):
    """Before Qwen2-VL's decoder was called language_model, and its tower was below model."""
    made = on(tiny_folder, target_modules="all-linear")
    made.save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    tensors = load_file(path)
    for today, earlier in SHORTER_NAMES.items():
        tensors = {name.replace(f".{today}", f".{earlier}"): t for name, t in tensors.items()}
    assert "base_model.model.visual.blocks.0.attn.qkv.lora_A.weight" in tensors
    save_file(tensors, path)
    loaded, _ = load_pretrained(settings(tmp_path))
    torch.testing.assert_close(logits(loaded), logits(made.eval()))
