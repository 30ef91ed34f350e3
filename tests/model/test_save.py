"""What a policy is saved as: the weights, the adapter, and the files of the model it began as."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForImageTextToText, AutoTokenizer
from transformers.processing_utils import ProcessorMixin

from mr1_fast.config import ModelConfig, TrainConfig
from mr1_fast.errors import UserError
from mr1_fast.model import save as saving
from mr1_fast.model.families import auto_class, base_model
from mr1_fast.model.load import load_pretrained, load_processor, make_policy
from mr1_fast.model.policy import Policy
from mr1_fast.model.processor import PROCESSOR_FILES, ImageTextProcessor
from mr1_fast.model.reference import Reference
from mr1_fast.model.save import check_save, save_pretrained, write_weights

from ..data.living import most_bytes
from ..data.models import fill_adapters, tiny_policy
from .test_blocks import batch_of

peft = pytest.importorskip("peft")


def settings(model: Path, **others) -> ModelConfig:
    return ModelConfig(model=str(model), device="cpu", recompute="none", **others)


def adapted(model: Path, **others) -> Policy:
    """A policy on the model in a folder, with adapters that have an effect."""
    config = settings(model, lora=True, lora_rank=4, **others)
    torch.manual_seed(1)
    policy = make_policy(*load_pretrained(config), config)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return policy


@torch.no_grad()
def logits(model: torch.nn.Module) -> torch.Tensor:
    return model(input_ids=torch.arange(10, 30)[None]).logits


@pytest.fixture(scope="module")
def finals(tiny_folder, tmp_path_factory):
    """What the policy `adapted(tiny_folder)` leaves with each --save, and its logits."""
    root, policy = tmp_path_factory.mktemp("finals"), adapted(tiny_folder)
    for save in ("merged", "adapter", "both"):
        save_pretrained(policy, root / save, save)
    return root, logits(policy.model)


def test_the_default_is_the_merged_model(tiny_folder, finals, tmp_path):
    save_pretrained(adapted(tiny_folder), tmp_path)
    merged = finals[0] / "merged"
    assert {p.name for p in tmp_path.iterdir()} == {p.name for p in merged.iterdir()}
    assert "adapter" not in {p.name for p in merged.iterdir()}
    assert not (finals[0] / "adapter" / "config.json").exists()
    inner = finals[0] / "adapter" / "adapter"
    files = {"adapter_config.json", "adapter_model.safetensors"}
    assert {p.name for p in inner.iterdir()} == files
    assert (finals[0] / "both" / "config.json").exists()


@pytest.mark.parametrize("save", ["merged", "adapter", "both"])
def test_each_of_them_loads_as_the_trained_policy(save, finals):
    root, expected = finals
    model, processor = load_pretrained(settings(root / save))
    torch.testing.assert_close(logits(model), expected, rtol=1e-4, atol=1e-5)
    assert load_processor(settings(root / save)).tokenizer.get_vocab()
    assert processor.tokenizer.padding_side == "left"


@pytest.mark.parametrize("save", ["merged", "adapter"])
def test_training_goes_on_from_each_of_them(save, finals):
    root, expected = finals
    config = settings(root / save, lora=True, lora_rank=8)
    policy = make_policy(*load_pretrained(config), config)
    torch.testing.assert_close(logits(policy.model), expected, rtol=1e-4, atol=1e-5)
    assert {p.shape[0] for n, p in policy.model.named_parameters() if "lora_A" in n} == {8}


def test_over_4_bits_training_goes_on_with_the_adapter_itself(tiny_folder, tmp_path):
    pytest.importorskip("bitsandbytes")
    first = adapted(tiny_folder, load_in_4bit=True)
    save_pretrained(first, tmp_path / "final")
    assert not (tmp_path / "final" / "config.json").exists(), "the default is the adapter alone"

    config = settings(tmp_path / "final", lora=True, lora_rank=4, load_in_4bit=True)
    policy = make_policy(*load_pretrained(config), config)
    torch.testing.assert_close(logits(policy.model), logits(first.model))
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    assert len(trained) == 2 * 7 * 3

    batch, reference = batch_of(policy), Reference(policy)
    start = policy.logprobs(batch, 0.7)[0].detach()
    with torch.no_grad():
        for parameter in trained:
            parameter.add_(0.05)
    moved = policy.logprobs(batch, 0.7)[0].detach()
    assert (moved - start).abs().max() > 0.01
    assert torch.equal(reference.logprobs([batch], 0.7)[0], start), "what training began with"
    assert torch.equal(policy.logprobs(batch, 0.7)[0], moved)

    save_pretrained(policy, tmp_path / "next")
    again = load_pretrained(replace(config, model=str(tmp_path / "next"), lora=False))[0]
    torch.testing.assert_close(logits(again), logits(policy.model))

    with pytest.raises(UserError, match="of rank 4: pass --lora-rank 4"):
        load_pretrained(replace(config, lora_rank=8))


def test_an_adapter_that_an_earlier_version_left_at_the_top_loads(tiny_folder, finals, tmp_path):
    policy = adapted(tiny_folder)
    policy.model.save_pretrained(tmp_path)
    ProcessorMixin.save_pretrained(policy.processor, tmp_path)
    model, _ = load_pretrained(settings(tmp_path))
    torch.testing.assert_close(logits(model), finals[1], rtol=1e-4, atol=1e-5)


# --- weights --------------------------------------------------------------------------------------


FIRST = {
    "qwen2_vl": "model.layers.0.mlp.up_proj.weight",
    "qwen2_5_vl": "model.layers.0.mlp.up_proj.weight",
    "qwen3_vl": "model.language_model.layers.0.mlp.up_proj.weight",
    "qwen2": "model.layers.0.mlp.up_proj.weight",
    "qwen3": "model.layers.0.mlp.up_proj.weight",
}
"""What the models on the hub call a weight."""


@pytest.mark.parametrize("family, first", FIRST.items())
def test_weights_have_the_names_that_transformers_gives_them(family, first, tmp_path):
    policy = tiny_policy(family=family, lora=True, lora_rank=4)
    before = {name: value.clone() for name, value in policy.model.state_dict().items()}
    save_pretrained(policy, tmp_path / "ours", "both")
    after = policy.model.state_dict()
    assert all(torch.equal(value, after[name]) for name, value in before.items())

    plain = policy.model.unload()
    plain.save_pretrained(tmp_path / "theirs")
    names = [stored(tmp_path / folder).keys() for folder in ("ours", "theirs")]
    assert names[0] == names[1] and first in names[0]
    assert ("model.visual.pos_embed.weight" in names[0]) == (family == "qwen3_vl")
    ours, theirs = (
        json.loads((tmp_path / f / "config.json").read_text()) for f in ("ours", "theirs")
    )
    assert ours == theirs


@pytest.mark.parametrize("family", FIRST)
def test_what_is_saved_loads_by_the_auto_classes(family, tmp_path):
    """The merged model, the adapter on the model that it began as, and both beside each other."""
    policy = tiny_policy(family=family)
    save_pretrained(policy, tmp_path / "base")
    policy = adapted(tmp_path / "base")
    expected = logits(policy.model.eval())
    save_pretrained(policy, tmp_path / "final", "both")

    load = auto_class(base_model(policy.model).config).from_pretrained
    merged, info = load(tmp_path / "final", output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    torch.testing.assert_close(logits(merged.eval()), expected, rtol=1e-4, atol=1e-5)
    on_top = peft.PeftModel.from_pretrained(load(tmp_path / "base"), tmp_path / "final" / "adapter")
    torch.testing.assert_close(logits(on_top.eval()), expected, rtol=1e-4, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "final")
    assert tokenizer.get_vocab() == policy.processor.tokenizer.get_vocab()
    assert tokenizer.chat_template == policy.processor.chat_template


def stored(folder: Path) -> dict[str, torch.Tensor]:

    return {
        k: v for path in sorted(folder.glob("*.safetensors")) for k, v in load_file(path).items()
    }


def test_a_merged_model_in_several_files_needs_memory_for_one(tmp_path, monkeypatch):
    policy = tiny_policy(lora=True, lora_rank=4)
    fill_adapters(policy, torch.float32)
    save_pretrained(policy, tmp_path / "one")
    monkeypatch.setattr(saving, "SHARD_BYTES", 500_000)
    with most_bytes(monkeypatch) as most:
        save_pretrained(policy, tmp_path / "several")
    assert len(list((tmp_path / "several").glob("*.safetensors"))) > 5
    assert 0 < most[0] <= 500_000, "the merged weights of a file"

    one, several = (stored(tmp_path / name) for name in ("one", "several"))
    assert one.keys() == several.keys() and all(torch.equal(one[k], several[k]) for k in one)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "several")
    torch.testing.assert_close(logits(loaded), logits(policy.model), rtol=1e-4, atol=1e-5)


def test_a_tensor_larger_than_a_file_has_one_of_its_own(tmp_path):
    tensors = {"a": torch.ones(3), "b": torch.ones(100), "c": torch.ones(3)}
    write_weights(tmp_path, {n: t.nbytes for n, t in tensors.items()}, tensors.get, shard=40)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    assert len(set(index["weight_map"].values())) == 2
    assert index["metadata"]["total_size"] == 424
    assert all(torch.equal(stored(tmp_path)[name], tensor) for name, tensor in tensors.items())


# --- the processor's files ------------------------------------------------------------------------


@pytest.fixture
def hub_folder(tiny_folder, tmp_path):
    """A model whose processor has the files of Qwen2-VL's repositories, in a hand of their own."""
    policy = tiny_policy()
    folder = tmp_path / "hub"
    policy.model.save_pretrained(folder)
    policy.processor.save_pretrained(folder, "qwen2_vl")
    (folder / "chat_template.jinja").unlink()
    (folder / "chat_template.json").write_text(
        json.dumps({"chat_template": policy.processor.chat_template}, indent=4)
    )
    images = json.loads((folder / "preprocessor_config.json").read_text())
    sizes = images.pop("size")
    images |= {"min_pixels": sizes["shortest_edge"], "max_pixels": sizes["longest_edge"]}
    (folder / "preprocessor_config.json").write_text(json.dumps(images))
    (folder / "video_preprocessor_config.json").write_text(json.dumps(images, indent=3))
    generation = {"do_sample": True, "top_k": 1, "eos_token_id": [445, 446]}
    (folder / "generation_config.json").write_text(json.dumps(generation))
    config = json.loads((folder / "config.json").read_text())
    config["dtype"] = "float32"
    (folder / "config.json").write_text(json.dumps(config, indent=7))
    (folder / "README.md").write_text("of the base alone")
    return folder


@pytest.mark.parametrize("lora", [False, True])
def test_the_models_own_files_come_along_byte_for_byte(lora, hub_folder, tmp_path):
    config = settings(hub_folder, lora=lora)
    policy = make_policy(*load_pretrained(config), config)
    save_pretrained(policy, tmp_path / "final")
    copied = {p.name for pattern in PROCESSOR_FILES for p in hub_folder.glob(pattern)}
    assert len(copied) == 6
    for name in (*copied, "config.json"):
        ours, theirs = (folder / name for folder in (tmp_path / "final", hub_folder))
        assert ours.read_bytes() == theirs.read_bytes(), name
    added = {p.name for p in (tmp_path / "final").iterdir()} - copied
    assert added == {"config.json", "model.safetensors"}
    again = ImageTextProcessor.load(tmp_path / "final")
    assert again.chat_template == policy.processor.chat_template
    assert again.image_processor.to_dict() == policy.processor.image_processor.to_dict()


def test_the_files_of_a_model_of_text_come_along_byte_for_byte(tmp_path):
    """They are those of Qwen3's repositories, whose chat template is a setting of the tokenizer."""
    policy, hub = tiny_policy(family="qwen3"), tmp_path / "hub"
    policy.model.save_pretrained(hub)
    policy.processor.save_pretrained(hub, "qwen3")
    settings_file = hub / "tokenizer_config.json"
    values = json.loads(settings_file.read_text())
    values["chat_template"] = (hub / "chat_template.jinja").read_text()
    settings_file.write_text(json.dumps(values, indent=5))
    (hub / "chat_template.jinja").unlink()
    policy.processor.tokenizer.backend_tokenizer.model.save(str(hub))  # vocab.json, merges.txt
    (hub / "generation_config.json").write_text('{"eos_token_id": [300, 301],  "top_k": 20}')

    config = settings(hub)
    policy = make_policy(*load_pretrained(config), config)
    assert policy.processor.chat_template == values["chat_template"]
    save_pretrained(policy, tmp_path / "final")
    names = {path.name for path in hub.iterdir()}
    assert names >= {"vocab.json", "merges.txt", "tokenizer.json", "generation_config.json"}
    assert names == {path.name for path in (tmp_path / "final").iterdir()}
    for name in names - {"config.json", "model.safetensors"}:
        assert (tmp_path / "final" / name).read_bytes() == (hub / name).read_bytes(), name


def test_weights_of_another_dtype_than_the_models_say_so(hub_folder, tmp_path):
    config = settings(hub_folder, dtype="bfloat16")
    save_pretrained(make_policy(*load_pretrained(config), config), tmp_path / "final")
    assert json.loads((tmp_path / "final" / "config.json").read_text())["dtype"] == "bfloat16"


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen2_5_vl"])
def test_files_that_name_a_class_of_ours_give_way_to_those_of_transformers(family, tmp_path):
    """As in final/ of an earlier version, which nothing else could load."""
    policy = tiny_policy(family=family)
    old = tmp_path / "old"
    policy.model.save_pretrained(old)
    ProcessorMixin.save_pretrained(policy.processor, old)
    assert "ImageTextProcessor" in (old / "processor_config.json").read_text()

    config = settings(old)
    policy = make_policy(*load_pretrained(config), config)
    save_pretrained(policy, tmp_path / "final")
    assert not (tmp_path / "final" / "processor_config.json").exists()
    for name in ("preprocessor_config.json", "tokenizer_config.json"):
        found = json.loads((tmp_path / "final" / name).read_text())["processor_class"]
        assert (
            found == {"qwen2_vl": "Qwen2VLProcessor", "qwen2_5_vl": "Qwen2_5_VLProcessor"}[family]
        )
    again = ImageTextProcessor.load(tmp_path / "final")
    assert again.chat_template == policy.processor.chat_template
    assert again.image_processor.to_dict() == policy.processor.image_processor.to_dict()
    assert again.tokenizer.get_vocab() == policy.processor.tokenizer.get_vocab()


# --- settings -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "wrong, reason",
    [
        (dict(save="adapter"), "without adapters all weights are trained: add --lora"),
        (dict(save="both"), "without adapters all weights are trained: add --lora"),
        (dict(save="merged", lora=True, load_in_4bit=True), "python -m mr1_fast.merge"),
        (dict(save="both", lora=True, load_in_4bit=True), "python -m mr1_fast.merge"),
    ],
)
def test_what_cannot_be_saved_is_refused_at_once(wrong, reason):
    with pytest.raises(UserError, match=reason):
        TrainConfig(**wrong).check()
    TrainConfig(**{**wrong, "save": None}).check()
    TrainConfig(save="merged").check()


def test_an_adapter_on_an_adapter_would_have_no_model(finals):
    root = finals[0]
    with pytest.raises(UserError, match=r"python -m mr1_fast\.merge .* --output FOLDER"):
        check_save(TrainConfig(model=str(root / "adapter"), lora=True, save="adapter"))
    check_save(TrainConfig(model=str(root / "both"), lora=True, save="adapter"))
    check_save(TrainConfig(model=str(root / "adapter"), lora=True, save="merged"))
