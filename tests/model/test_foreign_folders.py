"""A model's folder from elsewhere: whatever it holds, nothing of it runs, and one sentence says so.

Each case is the folder of a tiny model with one thing changed.
"""

import ast
import json
import os
import pickle
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

import mr1_fast
from mr1_fast import bounded
from mr1_fast.config import ModelConfig
from mr1_fast.errors import UserError
from mr1_fast.merge.command import merge_adapter
from mr1_fast.merge.settings import MergeConfig
from mr1_fast.model.families import FAMILIES, auto_class
from mr1_fast.model.known import find_model_config
from mr1_fast.model.load import load_pretrained, load_processor
from mr1_fast.model.save import save_pretrained
from mr1_fast.model.sizes import check_relations, least_weights
from mr1_fast.model.tiny import family_config, family_processor
from mr1_fast.processes import module_process

from .test_description import hub  # noqa: F401 - a fixture
from .test_save import adapted

LONGEST = 500
"""The most characters of a sentence about a file of somebody else."""
COMMANDS = {
    "plan": lambda config: find_model_config(config.model),
    "processor": load_processor,
    "model": load_pretrained,
}
"""What commands do with a model's folder: each reads more than the one before."""
FROM = {"config": ["plan", "processor", "model"], "processor": ["processor", "model"]}
FROM["weights"] = ["model"]


@pytest.fixture
def folder(tiny_folder, tmp_path):
    """A copy of the folder of a tiny model."""
    return Path(shutil.copytree(tiny_folder, tmp_path / "model"))


@pytest.fixture(autouse=True)
def short(monkeypatch):
    """A second in place of five for what would go on for ever."""
    monkeypatch.setattr(bounded, "CPU_SECONDS", 1)


def refused(folder: Path, what: str, match: str | None = None) -> None:
    """Have the commands that read a part of the folder refuse it in one sentence."""
    config = ModelConfig(model=str(folder), device="cpu", recompute="none")
    for command in FROM[what]:
        with pytest.raises(UserError, match=match) as caught:
            COMMANDS[command](config)
        sentence = str(caught.value).replace(str(folder), "FOLDER")
        assert len(sentence) <= LONGEST and "\n" not in sentence, sentence
        assert sentence[-1] == "." and "FOLDER" in sentence, sentence


def change(path: Path, **values) -> None:
    """Change settings in a file of JSON, of which `part__name` is one within a part."""
    settings = json.loads(path.read_text())
    for name, value in values.items():
        *parts, last = name.split("__")
        place = settings
        for part in parts:
            place = place[part]
        place[last] = value
    path.write_text(json.dumps(settings))


# --- config.json ----------------------------------------------------------------------------------

NO_SIZES = (10**9, 10**400, 0, -1, 1.5, 64.0, "64", None, True, [64], {}, float("nan"))
SIZES = (
    *("text_config__hidden_size", "text_config__vocab_size", "text_config__num_hidden_layers"),
    *("text_config__num_attention_heads", "text_config__intermediate_size"),
    *("vision_config__depth", "vision_config__embed_dim", "vision_config__patch_size"),
    "vision_config__spatial_merge_size",
)


@pytest.mark.parametrize("size", SIZES)
def test_a_size_that_no_model_has(folder, size):
    original = (folder / "config.json").read_text()
    for value in NO_SIZES:
        (folder / "config.json").write_text(original)
        change(folder / "config.json", **{size: value})
        with pytest.raises(UserError, match=r"in its config\.json, which must be") as caught:
            find_model_config(str(folder))
        assert len(str(caught.value)) < LONGEST


CONFIGS = {
    "a list": "[]",
    "a number": "5",
    "nothing": "",
    "cut": '{"model_type": "qwen2_vl", "text',
    "deep lists": '{"model_type": "qwen2_vl", "x": ' + "[" * 10**5 + "]" * 10**5 + "}",
    "deep settings": '{"model_type": "qwen2_vl"' + ', "a": {"b": 1' * 200 + "}" * 201,
    "a long number": '{"model_type": "qwen2_vl", "hidden_size": ' + "1" * 5000 + "}",
    "zeros": "\0" * 500,
    "no text_config": '{"model_type": "qwen2_vl", "text_config": 5}',
    "a type of 9 MB": '{"model_type": "' + "x" * 9_000_000 + '"}',
}


@pytest.mark.parametrize("text", CONFIGS.values(), ids=CONFIGS)
def test_a_damaged_config(folder, text):
    (folder / "config.json").write_text(text)
    refused(folder, "config")


RELATIONS = {
    "heads": ({"text_config__num_attention_heads": 5}, "divisor of"),
    "groups": ({"text_config__num_key_value_heads": 3}, "num_key_value_heads = 3"),
    "an odd head": ({"text_config__head_dim": 31}, None),
    "heads of the tower": ({"vision_config__num_heads": 7}, "num_heads = 7"),
    "angles": ({"text_config__rope_parameters__rope_theta": -1.0}, "rope_theta = -1.0"),
    "sections of angles": (
        {"text_config__rope_parameters__mrope_section": [10**8] * 3},
        "three numbers that add up to 16",
    ),
    "no sections": ({"text_config__rope_parameters__mrope_section": []}, "mrope_section"),
    "sections in a number": ({"text_config__rope_parameters__mrope_section": 16}, "mrope_section"),
    "labels": ({"num_labels": 10**7}, "num_labels = 10000000"),
    "attention from the hub": ({"attn_implementation": "me/kernel"}, "me/kernel"),
    "attention, too": ({"_attn_implementation": "me/kernel@main:x"}, "me/kernel"),
}


@pytest.mark.parametrize("values, match", RELATIONS.values(), ids=RELATIONS)
def test_settings_that_do_not_fit(folder, values, match):
    change(folder / "config.json", **values)
    refused(folder, "config", match)


def test_a_model_larger_than_its_files_asks_for_no_memory(folder):
    """At 2¹⁶ channels and 512 layers it would be 13 TB."""
    change(
        folder / "config.json",
        text_config__hidden_size=2**16,
        text_config__num_hidden_layers=512,
        text_config__layer_types=None,
        text_config__rope_parameters__mrope_section=[0, 2**12, 2**12],
        vision_config__hidden_size=2**16,
    )
    refused(folder, "weights", "weights by its config.json, but its files hold")


PARTS = {
    "text_config__vocab_size": 2**22,
    "text_config__intermediate_size": 2**20,
    "vision_config__depth": 1024,
    "vision_config__mlp_ratio": 2**20,
}


@pytest.mark.parametrize("name, value", PARTS.items())
@pytest.mark.parametrize("quantised", [False, True])
def test_a_part_that_is_larger_than_all_files_asks_for_no_memory(folder, name, value, quantised):
    form = {"quant_method": "bitsandbytes", "load_in_4bit": True}
    change(folder / "config.json", **{name: value}, quantization_config=form if quantised else None)
    refused(folder, "weights", "weights by its config.json, but its files hold")


@pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
def test_the_lower_bound_of_a_models_weights_is_close(family):
    config = family_config(family_processor(family), family)
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    weights = sum(parameter.numel() for parameter in model.parameters())
    assert 0.95 * weights < least_weights(config) <= weights


@pytest.mark.parametrize("value", [10**8, -1, None])
def test_a_token_for_videos_that_is_none(folder, value):
    change(folder / "config.json", video_token_id=value)
    refused(folder, "processor")


def test_windows_smaller_than_a_token():
    family = FAMILIES["qwen2_5_vl"]
    config = family_config(family_processor(family), family)
    check_relations("me/model", config)
    config.vision_config.window_size = 27
    with pytest.raises(UserError, match=r"window_size = 27 .* must be at least 28"):
        check_relations("me/model", config)


def test_mergers_of_more_blocks_than_there_are():
    family = FAMILIES["qwen3_vl"]
    config = family_config(family_processor(family), family)
    for blocks in ([0] * 9000, [0, config.vision_config.depth], [-1]):
        config.vision_config.deepstack_visual_indexes = blocks
        with pytest.raises(UserError, match="must be some blocks of its tower"):
            check_relations("me/model", config)


@pytest.mark.parametrize("key", ["attn_implementation", "_attn_implementation"])
def test_attention_that_is_not_installed_is_not_asked_for(folder, key):
    """Where the package kernels is installed, transformers would download it as code."""
    change(folder / "config.json", **{key: "flash_attention_3"})
    model, _ = load_pretrained(ModelConfig(model=str(folder), device="cpu", recompute="none"))
    assert model.config._attn_implementation == "sdpa"


# --- weights --------------------------------------------------------------------------------------


class Runs:
    """What creates a file when it is unpickled."""

    def __init__(self, sentinel: Path):
        self.sentinel = sentinel

    def __reduce__(self):
        return os.mkdir, (str(self.sentinel),)


PICKLED = (
    "pytorch_model.bin",
    "model.bin",
    "model.pt",
    "consolidated.00.pth",
    "pytorch_model.ckpt",
)


@pytest.mark.parametrize("name", PICKLED)
@pytest.mark.parametrize("plain", [True, False])
def test_pickled_weights_are_never_read(folder, tmp_path, name, plain):
    (folder / "model.safetensors").unlink()
    harmful = Runs(tmp_path / "RAN")
    if plain:
        (folder / name).write_bytes(pickle.dumps(harmful))
    else:
        torch.save({"lm_head.weight": harmful}, folder / name)
    refused(folder, "weights", "save_pretrained, which writes safetensors")
    assert not (tmp_path / "RAN").exists()


def test_pickles_beside_the_weights_are_left_alone(folder, tmp_path):
    for name in ("optimizer.pt", "training_args.bin", "rng_state.pth", "pytorch_model.bin"):
        (folder / name).write_bytes(pickle.dumps(Runs(tmp_path / "RAN")))
    load_pretrained(ModelConfig(model=str(folder), device="cpu", recompute="none"))
    assert not (tmp_path / "RAN").exists()


INDEXES = {
    "a pickle": ({"lm_head.weight": "evil.bin"}, "evil.bin: pickled weights can run code"),
    "outside": ({"lm_head.weight": "../../etc/passwd"}, "outside its folder"),
    "absolute": ({"lm_head.weight": "/etc/passwd"}, "outside its folder"),
    "a NUL": ({"lm_head.weight": "a\0.safetensors"}, "outside its folder"),
    "another kind": ({"lm_head.weight": "config.json"}, "no file of safetensors"),
    "missing": ({"lm_head.weight": "gone.safetensors"}, "has no gone.safetensors"),
    "a number": ({"lm_head.weight": 5}, "names no files"),
    "a list": ([], "names no files"),
    "empty": ({}, "names no files"),
}


@pytest.mark.parametrize("names, match", INDEXES.values(), ids=INDEXES)
def test_an_index_of_weights_that_names_other_files(folder, tmp_path, names, match):
    (folder / "model.safetensors").unlink()
    (folder / "evil.bin").write_bytes(pickle.dumps(Runs(tmp_path / "RAN")))
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": names}))
    refused(folder, "weights", match)
    assert not (tmp_path / "RAN").exists()


@pytest.mark.parametrize("file", ["x.safetensors", "x.safetensors.index.json", "adapter_model.bin"])
def test_a_config_that_names_its_own_file_of_weights(folder, file):
    """transformers reads that instead of the files that were looked at."""
    names = safe_open(folder / "model.safetensors", "pt").keys()
    index = {"metadata": {}, "weight_map": dict.fromkeys(names, "../elsewhere.safetensors")}
    shutil.copy(folder / "model.safetensors", folder.parent / "elsewhere.safetensors")
    (folder / file).write_text(json.dumps(index))
    change(folder / "config.json", transformers_weights=file)
    refused(folder, "weights", "remove transformers_weights there")


WHOLE = 10**4
HEADERS = {
    "cut": lambda data: data[:-WHOLE],
    "a head alone": lambda data: data[:100],
    "empty": lambda data: b"",
    "a long header": lambda data: struct.pack("<Q", 2**60) + data[8:],
    "zeros": lambda data: bytes(len(data)),
    "a pickle": lambda data: pickle.dumps({}),
    "text": lambda data: b"version https://git-lfs.github.com/spec/v1\n",
    "a tensor beyond the file": lambda data: _header(
        {"w": {"dtype": "F32", "shape": [2**40], "data_offsets": [0, 2**42]}}
    ),
    "a shape of 2⁶⁴": lambda data: _header(
        {"w": {"dtype": "F32", "shape": [2**32, 2**32, 2], "data_offsets": [0, 8]}}
    ),
}


def _header(tensors: dict) -> bytes:
    text = json.dumps(tensors).encode()
    return struct.pack("<Q", len(text)) + text + bytes(8)


@pytest.mark.parametrize("damage", HEADERS.values(), ids=HEADERS)
def test_damaged_weights(folder, damage):
    path = folder / "model.safetensors"
    path.write_bytes(damage(path.read_bytes()))
    refused(folder, "weights", "has a damaged model.safetensors")


@pytest.mark.parametrize(
    "name, what",
    [
        ("config.json", "config"),
        ("tokenizer.json", "config"),
        ("preprocessor_config.json", "config"),
        ("generation_config.json", "config"),
        ("chat_template.jinja", "config"),
        ("model.safetensors", "config"),
    ],
)
def test_a_pipe_in_place_of_a_file_is_not_waited_for(folder, name, what):
    (folder / name).unlink()
    os.mkfifo(folder / name)
    refused(folder, what, "is no regular file but a pipe or a device")


# --- tokenizer, template, image processor ---------------------------------------------------------

TEXT = "{% for m in messages %}{% for p in m.content %}{{ p.text }}{% endfor %}{% endfor %}"
IMAGE = "<|vision_start|><|image_pad|><|vision_end|>"
TEMPLATES = {
    "raises": ("{{ raise_exception('no\nway') }}", "TemplateError: no"),
    "no syntax": ("{% for %}", "TemplateSyntaxError"),
    "unknown": ("{{ nothing.at.all }}", "UndefinedError"),
    "for ever": (
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "more than 1 seconds",
    ),
    "10¹² rounds": ("{% for i in range(10**12) %}{% endfor %}", "OverflowError"),
    "10 GB": ("{{ 'a' * 10**10 }}", "memory"),
    "doubling": (
        "{% set n = namespace(s='ab') %}{% for i in range(60) %}{% set n.s = n.s ~ n.s %}"
        "{% endfor %}{{ n.s }}",
        "memory|crashes",  # where its pages are slow to come, its time is over before its memory
    ),
    "a power": ("{{ 10 ** (10 ** 10) }}", "more than 1 seconds"),
    "wide": ("{{ '%1000000000000d' % 1 }}", "cannot be used"),
    "a loop of macros": (
        "{% macro f(n) %}{% if n %}{{ f(n-1) }}{{ f(n-1) }}{% endif %}{% endmacro %}{{ f(90) }}",
        "more than 1 seconds",
    ),
    "classes": ("{{ ().__class__.__mro__ }}", "SecurityError"),
    "globals": ("{{ cycler.__init__.__globals__.os.system('touch RAN') }}", "SecurityError"),
    "format": ("{{ '{0.__class__.__init__.__globals__}'.format(namespace) }}", "SecurityError"),
    "filters": (
        "{{ [''] | map(attribute='__class__') | map(attribute='__mro__') | list }}{{ x.y }}",
        "Error",
    ),
    "includes": ("{% include '/etc/passwd' %}", "TypeError"),
    "imports": ("{% import 'os' as os %}", "TypeError"),
    "no text": (f"{IMAGE} What is it?", "leaves out the text of the user"),
    "no image": (TEXT, "writes 0 images for one"),
    "two images": (IMAGE + TEXT + IMAGE, "writes 2 images for one"),
    "long": (IMAGE + TEXT + "{{ 'a' * 200000 }}", "writes 200,"),
}


@pytest.mark.parametrize("template, match", TEMPLATES.values(), ids=TEMPLATES)
def test_a_hostile_chat_template(folder, template, match, monkeypatch):
    monkeypatch.chdir(folder.parent)
    (folder / "chat_template.jinja").write_text(template)
    slow = "seconds" in match
    config = ModelConfig(model=str(folder), device="cpu", recompute="none")
    with pytest.raises(UserError, match=match) as caught:
        load_processor(config)
    if not slow:
        refused(folder, "processor", match)
    assert "chat template" in str(caught.value)
    assert sorted(os.listdir()) == ["model"]


TOKENIZERS = {
    "nothing": "",
    "a list": "[]",
    "no model": '{"version": "1.0"}',
    "zeros": "\0" * 100,
    "deep": "[" * 10**5,
}


@pytest.mark.parametrize("text", TOKENIZERS.values(), ids=TOKENIZERS)
def test_a_damaged_tokenizer(folder, text):
    (folder / "tokenizer.json").write_text(text)
    refused(folder, "processor")


def test_a_tokenizer_whose_pattern_backtracks(folder):
    change(
        folder / "tokenizer.json",
        pre_tokenizer={
            "type": "Split",
            "pattern": {"Regex": r"(\w+\s*|\s+\w*)+\1$"},
            "behavior": "Isolated",
            "invert": False,
        },
    )
    config = ModelConfig(model=str(folder), device="cpu", recompute="none")
    try:
        load_processor(config)
    except UserError as error:
        assert "cannot be used" in str(error)


def test_more_tokens_than_the_model_has_rows(folder):
    tokens = [
        {"id": 457 + i, "content": f"<|extra{i}|>", "special": True, "single_word": False,
         "lstrip": False, "rstrip": False, "normalized": False}
        for i in range(100)
    ]  # fmt: skip
    old = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    change(folder / "tokenizer.json", added_tokens=old + tokens)
    refused(folder, "processor", "tokenizer is not there, or not the model's")


IMAGES = {
    "patch_size 0": {"patch_size": 0},
    "another patch_size": {"patch_size": 16},
    "a patch_size of text": {"patch_size": "14"},
    "merge_size 0": {"merge_size": 0},
    "temporal": {"temporal_patch_size": 10**9},
    "a mean of four": {"image_mean": [0.5] * 4},
    "no mean": {"image_mean": "half"},
    "nothing to divide by": {"image_std": [0.0, 0.0, 0.0]},
    "a size of 10¹²": {"size": {"shortest_edge": 10**12, "longest_edge": 10**12}},
    "negative sizes": {"size": {"shortest_edge": -1, "longest_edge": -1}},
    "a size of text": {"size": {"shortest_edge": "small", "longest_edge": "large"}},
    "NaN": {"rescale_factor": float("nan")},
    "a resampling": {"resample": 99},
    "a list": [],
}


@pytest.mark.parametrize("values", IMAGES.values(), ids=IMAGES)
def test_a_hostile_image_processor(folder, values):
    path = folder / "preprocessor_config.json"
    if isinstance(values, dict):
        change(path, **values)
    else:
        path.write_text(json.dumps(values))
    refused(folder, "processor")


ENDS = (-1, 10**9, 1.5, True, "<end>", ["<end>"], [[1]], {}, [445, -1], list(range(5000)))


def test_ends_of_answers_that_are_no_tokens(folder):
    for ends in ENDS:
        change(folder / "generation_config.json", eos_token_id=ends)
        refused(folder, "weights", "generation_config.json")
    change(folder / "generation_config.json", eos_token_id=[445, 446], custom_generate="me/evil")
    change(folder / "generation_config.json", temperature=float("nan"), top_k="all")
    load_pretrained(ModelConfig(model=str(folder), device="cpu", recompute="none"))


# --- code -----------------------------------------------------------------------------------------

EVIL = "import os; os.mkdir('RAN')\nfrom transformers import *\nclass C(Qwen2VLConfig): pass\n"
CLASSES = {"AutoConfig": "evil.C", "AutoTokenizer": ["evil.C", "evil.C"], "AutoModel": "evil.C"}
CLASSES |= {"AutoModelForImageTextToText": "evil.C", "AutoImageProcessor": "evil.C"}
CLASSES |= {"AutoProcessor": "evil.C"}


def with_code(folder: Path) -> None:
    """Have every file of a folder name code beside it."""
    (folder / "evil.py").write_text(EVIL)
    (folder / "custom_generate").mkdir()
    (folder / "custom_generate" / "generate.py").write_text(EVIL)
    for name in ("config", "tokenizer_config", "preprocessor_config", "processor_config"):
        path = folder / f"{name}.json"
        if not path.exists():
            path.write_text("{}")
        change(path, auto_map=CLASSES)


def test_code_beside_a_model_of_a_known_type_is_ignored(folder, monkeypatch):
    monkeypatch.chdir(folder.parent)
    monkeypatch.setattr("builtins.input", lambda *asked: pytest.fail("it was asked"))
    with_code(folder)
    load_pretrained(ModelConfig(model=str(folder), device="cpu", recompute="none"))
    change(folder / "tokenizer_config.json", tokenizer_class="EvilTokenizer")
    try:
        load_processor(ModelConfig(model=str(folder), device="cpu"))
    except UserError as error:
        assert "\n" not in str(error)
    assert sorted(os.listdir()) == ["model"]


def test_a_yes_on_standard_input_runs_nothing(folder, tmp_path):
    with_code(folder)
    change(folder / "config.json", model_type="evil")
    command, environment = module_process("mr1_fast.train", "--model", str(folder), "--steps", "1")
    done = subprocess.run(
        [*command, "--output", str(tmp_path / "run")],
        input="y\n" * 100, cwd=tmp_path, env=environment, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 2 and "model type evil" in done.stderr, done.stderr
    assert done.stderr.startswith("error: ") and done.stderr.count("\n") == 1
    assert not (tmp_path / "RAN").exists()


def test_every_call_that_loads_forbids_code():
    """PEFT and the configuration classes run none, and take no such argument."""
    calls = 0
    for path in Path(mr1_fast.__file__).parent.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call) or not isinstance(node.func, ast.Attribute):
                continue
            if node.func.attr != "from_pretrained" or "PeftModel" in ast.unparse(node.func):
                continue
            calls += 1
            given = {word.arg: ast.unparse(word.value) for word in node.keywords}
            assert given.get("trust_remote_code") == "False", f"{path}:{node.lineno}"
    assert calls >= 4


# --- the hub --------------------------------------------------------------------------------------


def of_hub(folder: Path, *without: str) -> dict[str, bytes]:
    """Return the files of a folder as the fake Hub has them."""
    return {path.name: path.read_bytes() for path in folder.iterdir() if path.name not in without}


@pytest.mark.thorough
def test_models_of_the_hub_are_held_to_the_same(hub, folder, tmp_path):  # noqa: F811
    config = ModelConfig(model="me/model", device="cpu", recompute="none")
    hub.repos["me/model"] = [of_hub(folder)]
    for command in COMMANDS.values():
        command(config)

    pickled = pickle.dumps(Runs(tmp_path / "RAN"))
    others = {
        "has no model.safetensors": of_hub(folder, "model.safetensors")
        | {"pytorch_model.bin": pickled},
        "is an adapter on the hub": of_hub(folder)
        | {"adapter_config.json": b"{}", "adapter_model.bin": pickled},
        "leaves out the text": of_hub(folder) | {"chat_template.jinja": b"What?"},
    }
    for match, files in others.items():
        name = f"me/{match.split()[1]}"
        hub.repos[name] = [files]
        with pytest.raises(UserError, match=match):
            load_pretrained(ModelConfig(model=name, device="cpu", recompute="none"))
    assert not (tmp_path / "RAN").exists()


# --- adapters -------------------------------------------------------------------------------------


@pytest.fixture
def adapter(folder, tmp_path):
    """A copy of the tiny model as `folder`, and an adapter on it."""
    pytest.importorskip("peft")
    save_pretrained(adapted(folder), tmp_path / "run", "adapter")
    return tmp_path / "run" / "adapter"


ADAPTERS = {
    "a rank of 10⁹": ({"r": 10**9}, "has the rank 1000000000"),
    "a rank of text": ({"r": "8"}, "has the rank 8 in"),
    "no rank": ({"r": None}, "has the rank None"),
    "ranks by layer": ({"rank_pattern": {"q_proj": 10**9}}, "has the rank 1000000000"),
    "ranks in a list": ({"rank_pattern": [5]}, "must be a mapping"),
    "α of NaN": ({"lora_alpha": float("nan")}, "lora_alpha = nan"),
    "α of text": ({"lora_alpha": "16"}, "lora_alpha = 16"),
    "no such layers": ({"target_modules": ["nothing"]}, "does not fit its model"),
    "other layers": ({"target_modules": ["q_proj"]}, "other tensors than its settings"),
    "a pattern for ever": (
        {"target_modules": "(a|a|[a-z_.0-9]+)+[a-z_.0-9]*!"},
        "more than 1 seconds",
    ),
    "a pattern that is none": ({"target_modules": "(("}, "cannot be used"),
    "another kind": ({"peft_type": "PROMPT_TUNING"}, "reads LoRA alone"),
    "an unheard kind": ({"peft_type": ["x"] * 999}, "reads LoRA alone"),
    "activated": ({"alora_invocation_tokens": [5]}, "has alora_invocation_tokens"),
    "tokens that are none": ({"trainable_token_indices": [10**9]}, "does not fit its model"),
    "layers repeated": ({"layer_replication": [[0, 10**9]]}, ""),
    "code": ({"megatron_config": {"x": 1}, "megatron_core": "evil"}, ""),
    "no base": ({"base_model_name_or_path": None}, "does not name the model under it"),
    "a base of NUL": ({"base_model_name_or_path": "a\0"}, "does not name the model under it"),
    "a list of bases": ({"base_model_name_or_path": ["a"]}, "does not name the model under it"),
    "a base that is gone": ({"base_model_name_or_path": "/" + "x" * 5000}, "is not there"),
}


@pytest.mark.parametrize("values, match", ADAPTERS.values(), ids=ADAPTERS)
def test_a_hostile_adapter(adapter, values, match, monkeypatch):
    monkeypatch.chdir(adapter)
    (adapter / "evil.py").write_text(EVIL)
    change(adapter / "adapter_config.json", **values)
    config = ModelConfig(model=str(adapter), device="cpu", recompute="none")
    if match:
        with pytest.raises(UserError, match=match) as caught:
            load_pretrained(config)
        assert len(str(caught.value).replace(str(adapter), "")) < LONGEST
    else:
        load_pretrained(config)  # the setting is not handed on
    assert not (adapter / "RAN").exists()


def with_a_deep_index(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "one.safetensors")
    (folder / "model.safetensors.index.json").write_text("[" * 10**5)


BASES = {
    "a pickle": lambda folder: (folder / "model.safetensors").rename(folder / "pytorch_model.bin"),
    "cut": lambda folder: (folder / "model.safetensors").write_bytes(b"12345678"),
    "an index": with_a_deep_index,
    "a size": lambda folder: change(folder / "config.json", text_config__hidden_size=10**9),
    "a pipe": lambda folder: os.mkfifo(folder / "vocab.json"),
    "a tokenizer": lambda folder: (folder / "tokenizer.json").write_text("{}"),
}


@pytest.mark.parametrize("damage", BASES.values(), ids=BASES)
def test_a_merge_into_a_hostile_base(adapter, folder, tmp_path, damage):
    damage(folder)
    with pytest.raises(UserError) as caught:
        merge_adapter(MergeConfig(adapter=str(adapter), output=str(tmp_path / "merged")))
    assert len(str(caught.value).replace(str(folder), "")) < LONGEST
    assert not (tmp_path / "merged").exists()


@pytest.mark.parametrize(
    "name, value, match",
    [
        ("lora_alpha", float("nan"), "lora_alpha = nan"),
        ("alora_invocation_tokens", [5], "alora_invocation_tokens is set"),
        ("arrow_config", {"top_k": 1}, "arrow_config is set"),
    ],
)
def test_a_merge_of_a_hostile_adapter(adapter, tmp_path, name, value, match):
    change(adapter / "adapter_config.json", **{name: value})
    with pytest.raises(UserError, match=match):
        merge_adapter(MergeConfig(adapter=str(adapter), output=str(tmp_path / "merged")))


def test_adapters_that_lie_on_themselves_or_on_many(tmp_path):
    def name(folder: str, base: str) -> None:
        (tmp_path / folder).mkdir(exist_ok=True)
        settings = {"base_model_name_or_path": str(tmp_path / base), "peft_type": "LORA"}
        (tmp_path / folder / "adapter_config.json").write_text(json.dumps(settings))

    for i in reversed(range(50)):
        name(f"{i}", f"{i + 1}")
    name("50", "50")
    name("a", "b")
    name("b", "a")
    for start in ("50", "a", "0"):
        config = ModelConfig(model=str(tmp_path / start), device="cpu")
        for command in COMMANDS.values():
            with pytest.raises(UserError, match="lies on itself, or on more than 8 others"):
                command(config)


def test_damaged_tensors_of_an_adapter(adapter, tmp_path):
    path = adapter / "adapter_model.safetensors"
    whole = path.read_bytes()
    config = ModelConfig(model=str(adapter), device="cpu", recompute="none")
    for damaged in (whole[:-100], b"", struct.pack("<Q", 2**60) + whole[8:], pickle.dumps({})):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"has a damaged adapter_model\.safetensors"):
            load_pretrained(config)
    path.unlink()
    torch.save({"x": Runs(tmp_path / "RAN")}, adapter / "adapter_model.bin")
    with pytest.raises(UserError, match="which writes safetensors"):
        load_pretrained(config)
    assert not (tmp_path / "RAN").exists()
