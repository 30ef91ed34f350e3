"""Configurations of published models are known by their names, and have their sizes."""

import pytest
import torch
from torch import nn

from mr1_fast.command_line import parse_train_config
from mr1_fast.errors import UserError
from mr1_fast.model.families import FAMILIES, auto_class
from mr1_fast.model.known import find_model_config, known_names, published_config

GIB = 2**30
WEIGHTS = {
    "Qwen/Qwen2-VL-2B": 2_208_985_600,
    "Qwen/Qwen2-VL-7B": 8_291_375_616,
    "Qwen/Qwen2.5-VL-3B": 3_754_622_976,
    "Qwen/Qwen2.5-VL-7B": 8_292_166_656,
    "Qwen/Qwen3-VL-2B": 2_127_532_032,
    "Qwen/Qwen3-VL-4B": 4_437_815_808,
    "Qwen/Qwen3-VL-8B": 8_767_123_696,
    "Qwen/Qwen2.5-0.5B": 494_032_768,
    "Qwen/Qwen2.5-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-3B": 3_085_938_688,
    "Qwen/Qwen2.5-7B": 7_615_616_512,
    "Qwen/Qwen2.5-Math-1.5B": 1_543_714_304,
    "Qwen/Qwen2.5-Math-7B": 7_615_616_512,
    "Qwen/Qwen3-0.6B": 596_049_920,
    "Qwen/Qwen3-1.7B": 1_720_574_976,
    "Qwen/Qwen3-4B": 4_022_468_096,
    "Qwen/Qwen3-8B": 8_190_735_360,
}
"""The numbers of parameters that their files on the hub have."""


def empty_model(name: str) -> nn.Module:
    config = find_model_config(name)
    with torch.device("meta"):
        return auto_class(config).from_config(config)


def test_every_size_has_the_parameters_of_its_published_files():
    known = [name for family in FAMILIES.values() for name in family.sizes]
    counts = {name: sum(p.numel() for p in empty_model(name).parameters()) for name in known}
    assert counts == WEIGHTS


@pytest.mark.parametrize(
    "name, family, layers",
    [
        ("Qwen/Qwen2-VL-2B", "qwen2_vl", 28),
        ("qwen/qwen2.5-vl-3b-instruct", "qwen2_5_vl", 36),
        ("Qwen/Qwen3-VL-4B-Instruct", "qwen3_vl", 36),
        ("Qwen/Qwen3-VL-8B-Thinking", "qwen3_vl", 36),
        ("Qwen/Qwen2.5-Math-1.5B-Instruct", "qwen2", 28),
        ("Qwen/Qwen2.5-0.5B", "qwen2", 24),
        ("Qwen/Qwen3-4B", "qwen3", 36),
        ("Qwen/Qwen3-4B-Instruct-2507", "qwen3", 36),
        ("Qwen/Qwen3-4B-Thinking-2507", "qwen3", 36),
        ("QWEN/qwen3-1.7b-base", "qwen3", 28),
    ],
)
def test_names_of_one_size(name, family, layers):
    config = published_config(name)
    assert config.model_type == family
    assert config.get_text_config().num_hidden_layers == layers


@pytest.mark.parametrize(
    "name", ["Qwen/Qwen3-VL-4B-Instruct-FP8", "Qwen/Qwen3-VL-30B-A3B-Instruct", "x/Qwen3-4B", ""]
)
def test_other_models_are_not_taken_for_these(name):
    assert published_config(name) is None


def test_what_cannot_be_found_is_told_which_names_are_known():
    with pytest.raises(UserError, match=r"model no/such-name has no configuration") as error:
        find_model_config("no/such-name")
    assert known_names() in str(error.value) and "did you mean" not in str(error.value)
    assert "tiny-text" in known_names() and "Qwen/Qwen3-VL-{2B,4B,8B}" in known_names()
    assert len(known_names()) < 300


@pytest.mark.parametrize("name", [" tiny-text", "TINY-Text "])
def test_blanks_and_capitals_do_not_hide_a_built_in_model(name):
    assert find_model_config(name).model_type == "qwen3"
    config = parse_train_config([f"--model={name}"])
    assert config.model == "tiny-text" and config.task == "arithmetic"
    assert find_model_config(" Qwen/Qwen3-4B ").model_type == "qwen3"


@pytest.mark.parametrize(
    "name, meant",
    [
        ("tiny-qwen3-vl", "tiny-qwen3vl"),
        ("Qwen3-VL-4B-Instruct", "Qwen/Qwen3-VL-4B"),
        ("qwen/qwen2.5-VL-7B-Instuct", "Qwen/Qwen2.5-VL-7B"),
    ],
)
def test_a_name_that_is_almost_known_is_told_the_known_one(name, meant):
    with pytest.raises(UserError, match=rf"did you mean {meant}\? Else check the name"):
        find_model_config(name)


def test_a_damaged_file_is_not_blamed_on_the_network(tmp_path):
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(UserError, match=r"\(.*not a valid JSON.*\): copy the original") as error:
        find_model_config(str(tmp_path))
    assert "network" not in str(error.value)
