"""Adapters on disk: what they say of the model under them, and what is said where none fits."""

import json
from pathlib import Path

import pytest
import torch

from mr1_fast.errors import UserError
from mr1_fast.model.families import base_model
from mr1_fast.model.load import load_pretrained
from mr1_fast.model.save import save_pretrained

from .test_save import adapted, settings

pytest.importorskip("peft")


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
