"""Merging an adapter into its model: PEFT's numbers, the base's files, memory for one file."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from mr1_fast.errors import UserError
from mr1_fast.merge.command import merge_adapter
from mr1_fast.merge.settings import MergeConfig, parse
from mr1_fast.model import save as saving
from mr1_fast.model.families import FAMILIES
from mr1_fast.model.load import load_pretrained, make_policy
from mr1_fast.model.save import save_pretrained

from ..data.living import most_bytes
from ..data.models import tiny_policy
from ..model.test_save import adapted, settings, stored

peft = pytest.importorskip("peft")


def train(root: Path, dtype: str, family: str = "qwen2_vl") -> Path:
    """Make a base of a dtype, and the final folder of a run with an adapter on it."""
    save_pretrained(tiny_policy(getattr(torch, dtype), family), root / "base")
    save_pretrained(adapted(root / "base", dtype=dtype), root / "final", "adapter")
    return root


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    return train(tmp_path_factory.mktemp("trained"), "float32")


def merge(adapter: Path, output: Path, *others: str) -> Path:
    merge_adapter(parse([str(adapter), "--output", str(output), *others]))
    return output


@pytest.mark.parametrize(
    "family, dtype",
    [
        ("qwen2_vl", "float32"),
        ("qwen2_vl", "bfloat16"),
        ("qwen2_5_vl", "float32"),
        ("qwen3_vl", "bfloat16"),
        ("qwen2", "float32"),
        ("qwen3", "bfloat16"),
    ],
)
def test_the_merged_model_is_that_of_peft(family, dtype, tmp_path, capsys):
    made = train(tmp_path, dtype, family)
    merged = merge(made / "final", tmp_path / "merged")
    assert capsys.readouterr().out.startswith(f"wrote {merged}: ")
    base = getattr(transformers, FAMILIES[family].auto_class).from_pretrained(made / "base")
    theirs = peft.PeftModel.from_pretrained(base, made / "final" / "adapter").merge_and_unload()
    theirs.save_pretrained(tmp_path / "theirs")

    ours, theirs, before = map(stored, (merged, tmp_path / "theirs", made / "base"))
    assert ours.keys() == theirs.keys() == before.keys()
    changed = {name for name in ours if not torch.equal(ours[name], before[name])}
    assert len(changed) == 7 * 3
    assert all(weight.dtype == getattr(torch, dtype) for weight in ours.values())
    for name, weight in theirs.items():
        torch.testing.assert_close(ours[name], weight)  # to a rounding


def test_a_run_that_saves_both_has_the_same_merged_model(trained, tmp_path):
    save_pretrained(adapted(trained / "base"), tmp_path / "both", "both")
    ours = stored(merge(tmp_path / "both" / "adapter", tmp_path / "merged"))
    expected = stored(tmp_path / "both")
    assert ours.keys() == expected.keys()
    for name, weight in expected.items():
        torch.testing.assert_close(ours[name], weight)


def test_all_other_files_are_the_bases_own(trained, tmp_path):
    merged = merge(trained / "final", tmp_path / "merged")
    names = {path.name for path in merged.iterdir()}
    assert names == {path.name for path in (trained / "base").iterdir()}
    for name in names - {"model.safetensors"}:
        assert (merged / name).read_bytes() == (trained / "base" / name).read_bytes()
    config = settings(merged)
    assert make_policy(*load_pretrained(config), config).processor.tokenizer.get_vocab()


def test_memory_for_one_file_at_a_time(trained, tmp_path, monkeypatch):
    base = AutoModelForImageTextToText.from_pretrained(trained / "base")
    base.save_pretrained(tmp_path / "base", max_shard_size=600_000)
    for name in ("tokenizer.json", "tokenizer_config.json", "preprocessor_config.json"):
        shutil.copyfile(trained / "base" / name, tmp_path / "base" / name)
    assert len(list((tmp_path / "base").glob("*.safetensors"))) > 2
    whole = sum(p.stat().st_size for p in (tmp_path / "base").glob("*.safetensors"))
    adapter = sum(p.stat().st_size for p in (trained / "final" / "adapter").glob("*.safetensors"))

    monkeypatch.setattr(saving, "SHARD_BYTES", 300_000)
    with most_bytes(monkeypatch) as most:
        merge(trained / "final", tmp_path / "merged", "--base", str(tmp_path / "base"))
    assert 0 < most[0] <= 300_000 + adapter < whole / 2
    ours = stored(merge(trained / "final", tmp_path / "again"))
    several = stored(tmp_path / "merged")
    assert ours.keys() == several.keys() and all(torch.equal(ours[k], several[k]) for k in ours)
    loaded = AutoModelForImageTextToText.from_pretrained(tmp_path / "merged")
    assert torch.equal(loaded.state_dict()["lm_head.weight"], ours["model.embed_tokens.weight"])


@pytest.mark.parametrize("form", ["model.language_model.", "model."])
def test_names_of_other_ages_meet(form, trained, tmp_path):
    """A base as transformers 4.52 wrote it, or an adapter as it was trained on an older one."""
    expected = stored(merge(trained / "final", tmp_path / "expected"))
    copy = tmp_path / "copy"
    shutil.copytree(trained, copy)
    if form == "model.language_model.":
        path, old, new = copy / "base" / "model.safetensors", "model.", form
    else:
        path = copy / "final" / "adapter" / "adapter_model.safetensors"
        old, new = "base_model.model.model.language_model.", "base_model.model.model."
    tensors = load_file(path)
    renamed = {
        new + name.removeprefix(old) if name.startswith(old) else name: tensor
        for name, tensor in tensors.items()
    }
    assert renamed.keys() != tensors.keys()
    save_file(renamed, path, metadata={"format": "pt"})
    ours = stored(merge(copy / "final", tmp_path / "merged", "--base", str(copy / "base")))
    assert ours.keys() == stored(copy / "base").keys()
    for name, weight in expected.items():
        name = name if name in ours else new + name.removeprefix(old)
        assert torch.equal(ours[name], weight)


# --- what cannot be merged ------------------------------------------------------------------------


@pytest.fixture
def copied(trained, tmp_path):
    """A copy to spoil, whose adapter names the base beside it."""
    shutil.copytree(trained, tmp_path / "copy")
    write(tmp_path / "copy" / "final", base_model_name_or_path=str(tmp_path / "copy" / "base"))
    return tmp_path / "copy"


def write(final: Path, **changes) -> None:
    path = final / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def refused(copied: Path, reason: str, *others: str) -> None:
    with pytest.raises(UserError, match=reason) as told:
        merge(copied / "final", copied / "merged", *others)
    assert "\n" not in str(told.value)
    assert not list(copied.glob("*merged*")), "nothing is written"


@pytest.mark.parametrize(
    "change, reason",
    [
        (dict(peft_type="IA3"), "no plain LoRA .peft_type is IA3.*merge_and_unload"),
        (dict(use_dora=True), "use_dora is set"),
        (dict(bias="all"), "bias is all"),
        (dict(alpha_pattern={"q_proj": 3}), "alpha_pattern is set"),
        (dict(init_lora_weights="pissa_niter_4"), "init_lora_weights is pissa"),
        (dict(base_model_name_or_path=None), "does not name the model under it"),
        (dict(base_model_name_or_path="/gone/model"), "/gone/model, which is not there"),
        (dict(base_model_name_or_path="a b"), "base a b is no local folder, and the hub"),
    ],
    ids=str,
)
def test_an_adapter_that_is_more_than_that(change, reason, copied):
    write(copied / "final", **change)
    refused(copied, reason.replace("peft_type", "its peft_type"))


def change_tensors(path: Path, change) -> None:
    tensors = load_file(path)
    change(tensors)
    save_file(tensors, path, metadata={"format": "pt"})


def test_an_adapter_with_other_tensors(copied):
    path = copied / "final" / "adapter" / "adapter_model.safetensors"
    good = path.read_bytes()
    name = min(name for name in load_file(path) if "lora_A" in name)
    for other, tensor, reason in (
        (name.replace("lora_A.weight", "lora_magnitude_vector"), torch.ones(3), "it holds .*magni"),
        (name.replace("lora_A", "lora_embedding_A"), torch.ones(3, 3), "it holds .*embedding"),
        (name, torch.ones(3, 3), "damaged at .*do not fit together"),
        (name.replace("lora_B", "lora_A"), torch.ones(4, 999), "another shape .* at .*--base"),
        (name.replace("layers.0", "layers.9"), torch.ones(4, 3), "is damaged at"),
    ):
        path.write_bytes(good)
        change_tensors(path, lambda tensors, o=other, t=tensor: tensors.update({o: t}))
        refused(copied, reason)
    path.write_bytes(good)

    def move(tensors: dict) -> None:
        for factor in "AB":
            found = name.replace("lora_A", f"lora_{factor}")
            tensors[found.replace("layers.0", "layers.9")] = tensors.pop(found)

    change_tensors(path, move)
    refused(copied, "has no layer layers.9")
    path.write_bytes(good[:-9])
    refused(copied, "has a damaged adapter_model.safetensors")
    path.unlink()
    refused(copied, "has no adapter_model.safetensors")


def test_a_base_that_does_not_serve(copied):
    config = copied / "base" / "config.json"
    good = json.loads(config.read_text())
    config.write_text(json.dumps({**good, "quantization_config": {"load_in_4bit": True}}))
    refused(copied, "holds quantised weights.*name the 16-bit model with --base")
    config.write_text(json.dumps({**good, "model_type": "llama"}))
    refused(copied, "has the model type llama, but mr1_fast trains")
    config.write_text(json.dumps(good))
    index = copied / "base" / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../../secret.safetensors"}}))
    weights = copied / "base" / "model.safetensors"  # which counts more than an index
    weights.write_bytes(weights.read_bytes()[:-9])
    refused(copied, "has no whole set of safetensors files")
    weights.rename(copied / "base" / "pytorch_model.bin")
    refused(copied, "an index of its weights that names ../../secret.safetensors, outside its")
    index.unlink()
    refused(copied, "has no whole set of safetensors files")
    config.unlink()
    refused(copied, "has no config.json that names a model_type: copy the original")


def test_what_the_command_line_may_not_say(copied, tmp_path):
    for argv, reason in (
        ([], "no adapter is named"),
        (["a"], "name a new folder with --output"),
        (["a", "--output", str(copied)], "exists already: name a new folder"),
        (["a", "b", "--output", "c"], "unrecognized arguments: b"),
    ):
        with pytest.raises(UserError, match=reason):
            parse(argv)
    assert parse(["a", "--output", "x y", "--base=b"]) == MergeConfig("a", "x y", "b")
    with pytest.raises(UserError, match="has no adapter that waits to be merged"):
        merge(copied / "base", tmp_path / "merged")
