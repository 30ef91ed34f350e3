"""The model card of a run: what it says, that nothing breaks out of it, and what it keeps back."""

import io
import json
import re
from dataclasses import fields
from typing import get_type_hints

import numpy as np
import pytest
import yaml
from huggingface_hub import ModelCard, constants
from markdown_it import MarkdownIt
from PIL import Image

from mr1_fast.config import TrainConfig
from mr1_fast.config.objective import ALGORITHMS
from mr1_fast.errors import UserError
from mr1_fast.push.card import write_card
from mr1_fast.push.metadata import base_license
from mr1_fast.push.papers import OTHINK, PAPERS
from mr1_fast.push.picture import panels, training_picture
from mr1_fast.push.public import hub_name, public, public_settings

from .conftest import made_run


def card_of(folder, **settings):
    """The card of a made run with these settings: its metadata, and its text below that."""
    config = made_run(folder, **settings)
    write_card(folder, config)
    return read(folder)


def read(folder):
    written = (folder / "final" / "README.md").read_text(encoding="utf-8")
    head, text = re.fullmatch(r"---\n(.*?\n)---\n(.*)", written, re.DOTALL).groups()
    return yaml.safe_load(head), text


def html(text):
    """What a renderer with tables makes of a card, which keeps tags as the Hub does."""
    return MarkdownIt("commonmark", {"html": True}).enable("table").render(text)


def test_metadata_of_a_hub_model_on_hub_data(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    names = {"model": "Qwen/Qwen2-VL-2B-Instruct", "data": "leonardPKU/clevr_cogen_a_train"}
    head, text = card_of(tmp_path / "run", **names, lora=True)
    result = head.pop("model-index")[0]["results"][0]
    assert head == {
        "base_model": "Qwen/Qwen2-VL-2B-Instruct",
        "base_model_relation": "finetune",
        "datasets": ["leonardPKU/clevr_cogen_a_train"],
        "library_name": "transformers",
        "pipeline_tag": "image-text-to-text",
        "tags": ["grpo", "grpo-d", "mr1_fast", "arxiv:2503.16081", "peft", "lora"],
    }
    assert result["metrics"] == [{"type": "accuracy", "value": 0.75, "name": "accuracy, greedy"}]
    assert result["dataset"]["type"] == "leonardPKU/clevr_cogen_a_train"
    assert "(https://huggingface.co/Qwen/Qwen2-VL-2B-Instruct)" in text
    assert "(https://huggingface.co/datasets/leonardPKU/clevr_cogen_a_train)" in text
    # The Hub's own reader agrees.
    assert (
        ModelCard.load(tmp_path / "run" / "final" / "README.md").data.base_model == names["model"]
    )


def test_what_the_card_says(tmp_path):
    _, text = card_of(tmp_path / "run", model="/home/alice/my-qwen", data="/data/alice/rows.jsonl")
    assert "| greedy | 25.0% [10.0, 50.0] | **75.0% [50.0, 90.0]** | +50.0 points |" in text
    assert "Share of 20 held-out items (task counting, split test)" in text
    assert (
        "β falls from 0.07 to 0.04 over the first 30% of the steps, and then rises to 0.1" in text
    )
    assert "post-trained with [GRPO-D](https://arxiv.org/abs/2503.16081)" in text
    assert "This model is `my-qwen`" in text and "with `rows.jsonl`" in text
    assert "| prompt_suffix |" in text.partition("<details>")[2]
    assert "vllm serve path/to/final" in text
    with Image.open(tmp_path / "run" / "final" / "training.png") as picture:
        assert picture.format == "PNG" and picture.width > 900
    assert "](training.png)" in text


def test_the_code_is_python_that_asks_as_in_training(tmp_path):
    settings = {"system_prompt": 'Say "no".\n```', "prompt_suffix": "In {x} 'tags'.\\"}
    _, text = card_of(tmp_path / "run", **settings)
    [code] = re.findall(r"\n(`{3,})python\n(.*?)\n\1\n", text, re.DOTALL)
    lines = code[1].partition("messages = ")[2].partition("\ninputs")[0]
    system, user = eval(lines)  # of this test's own settings
    assert system == {"role": "system", "content": 'Say "no".\n```'}
    assert user["content"][1]["text"] == "How many circles are there? In {x} 'tags'.\\"
    compile(code[1], "card", "exec")


@pytest.mark.parametrize("whole", [True, False])
def test_a_model_of_text_is_listed_and_loaded_as_one(tmp_path, whole):
    config = made_run(tmp_path / "run", model="Qwen/Qwen3-4B", task="free", lora=True)
    final = tmp_path / "run" / "final"
    (final / "preprocessor_config.json").unlink()
    if not whole:
        (final / "model.safetensors").unlink()
    write_card(tmp_path / "run", config)
    head, text = read(tmp_path / "run")
    assert head["pipeline_tag"] == "text-generation"
    assert head["model-index"][0]["results"][0]["task"]["type"] == "text-generation"
    [code] = re.findall(r"\n```python\n(.*?)\n```\n", text, re.DOTALL)
    compile(code, "card", "exec")
    assert "from transformers import AutoModelForCausalLM, AutoTokenizer" in code
    assert 'tokenizer = AutoTokenizer.from_pretrained("path/to/final")' in code
    assert "processor" not in code and "image" not in code.lower()
    [message] = eval(code.partition("messages = ")[2].partition("\ninputs")[0])
    assert message["content"].startswith("What is the answer? Output the thinking")


@pytest.mark.parametrize("where", ["adapter", "."])
def test_an_adapter_alone_is_loaded_on_its_base(tmp_path, where):
    config = made_run(tmp_path / "run", model="/home/alice/my-qwen", lora=True, load_in_4bit=True)
    final = tmp_path / "run" / "final"
    (final / "model.safetensors").unlink()
    if where == ".":
        (final / "adapter" / "adapter_config.json").rename(final / "adapter_config.json")
    write_card(tmp_path / "run", config)
    head, text = read(tmp_path / "run")
    assert head["library_name"] == "peft" and head["tags"][-2:] == ["peft", "lora"]
    folder = ', subfolder="adapter"' if where == "adapter" else ""
    assert f'PeftModel.from_pretrained(model, "path/to/final"{folder})' in text
    assert "vllm serve my-qwen --enable-lora --max-lora-rank 32" in text
    assert "LoRA adapters of rank 32 over weights in 4 bits were trained" in text


@pytest.mark.parametrize("algo", ALGORITHMS)
def test_each_algorithm_is_named_and_cited(tmp_path, algo):
    settings = {"beta": 0.0} if algo in ("dr-grpo", "dapo", "gspo", "cispo") else {}
    _, text = card_of(tmp_path / "run", algo=algo, **settings)
    cited = re.findall(r"eprint = \{(.*)\}", text)
    assert cited == list(dict.fromkeys([OTHINK.arxiv, PAPERS.get(algo, OTHINK).arxiv]))
    assert ("No KL term." in text) == bool(settings)
    assert ("The KL weight β" in text) == (algo in ("grpo-d", "grpo"))


def test_every_algorithm_but_sft_has_its_paper():
    assert PAPERS.keys() == ALGORITHMS.keys() - {"sft"}


def test_no_setting_shows_a_path_or_a_token(tmp_path):
    secret = "/home/alice/secret/thing.py"
    kinds = get_type_hints(TrainConfig)
    settings = {
        field.name: secret
        for field in fields(TrainConfig)
        if kinds[field.name] in (str, str | None)
    }
    assert len(settings) > 10
    settings |= {
        "extra_rewards": {f"{secret}:fn": 1.0},
        "columns": {"problem": f"{secret} or ~/other/thing.csv"},
        "system_prompt": f"Look at {secret} with hf_abcdefghij0123456789.",
    }
    head, text = card_of(tmp_path / "run", **settings)
    for shown in (text, str(head)):
        for hidden in ("alice", "secret/", "/other", "hf_abc", str(tmp_path)):
            assert hidden not in shown, hidden
    assert "thing.py:fn" in text and "Look at thing.py with hf_…" in text


def test_the_base_of_a_run_that_went_on_from_an_adapter(tmp_path, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for name, base in (("first", "Qwen/Qwen2-VL-2B-Instruct"), ("second", str(tmp_path / "first"))):
        (tmp_path / name).mkdir()
        settings = json.dumps({"base_model_name_or_path": base})
        (tmp_path / name / "adapter_config.json").write_text(settings)
    head, text = card_of(tmp_path / "run", model=str(tmp_path / "second"), lora=True)
    assert head["base_model"] == "Qwen/Qwen2-VL-2B-Instruct"
    assert "This model is [Qwen/Qwen2-VL-2B-Instruct](https://huggingface.co/Qwen/" in text
    assert "Training went on from an earlier adapter of it." in text
    assert text.startswith("\n# Qwen/Qwen2-VL-2B-Instruct, trained with")


def test_the_step_of_the_best_weights(tmp_path):
    settings = {"keep_best": True, "eval_every": 1}
    config = made_run(tmp_path / "run", **settings)
    path = tmp_path / "run" / "evaluation.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"final_step": 2}))
    write_card(tmp_path / "run", config)
    assert "The weights are those after step 2, the best." in read(tmp_path / "run")[1]


def test_words_that_look_like_paths_stay():
    for text in ("<think> </think> and/or km/h", "https://a.org/b/c", "a/b", "/no_think Answer."):
        assert public(text) == text


@pytest.mark.parametrize(
    "path, shown",
    [
        ("/home/Ann Smith/x y.parquet", "x y.parquet"),
        ("../client/x.json", "x.json"),
        ("client/x.json", "x.json"),
        ("client/a/rows", "rows"),
        ("file:///home/ann/rows", "rows"),
        ("https://user:pw@host/a/rows.csv?key=1", "rows.csv"),
        ("https://user:pw@host", "host"),
        (r"C:\Users\ann\rows.csv", "rows.csv"),
        ("/home/ann/rows/", "rows"),
    ],
)
def test_a_path_that_is_gone_shows_its_last_part(tmp_path, path, shown):
    names = ("model", "data", "eval_data", "image_root", "plugin")
    config = TrainConfig(**dict.fromkeys(names, path), extra_rewards={f"{path}:fn": 1.0})
    settings = public_settings(config)
    assert {settings[name] for name in names} == {shown}
    if "?" not in path and not path.endswith("/"):
        assert list(settings["extra_rewards"]) == [f"{shown}:fn"]
    head, text = card_of(tmp_path / "run", **dict.fromkeys(names, path))
    for hidden in ("Smith", "client", "ann", "user:", "pw@"):
        assert hidden not in text + str(head), hidden
    assert public("at file:///home/a b, https://user:pw@host/x") == "at a b, https://host/x"


def test_hostile_settings_stay_text(tmp_path):
    breaks = "` | x\n---\n</details><script>alert(1)</script>![x](http://evil/a.png) [a](b)\n# big"
    settings = dict.fromkeys(("model", "data", "eval_split", "prompt_suffix"), breaks)
    config = made_run(tmp_path / "run", **settings, columns={breaks: breaks}, judge="strict")
    evaluation = json.loads((tmp_path / "run" / "evaluation.json").read_text())
    evaluation |= {"task": breaks, "split": breaks, "judge": breaks}
    evaluation["after"][breaks] = evaluation["after"]["greedy"]
    (tmp_path / "run" / "evaluation.json").write_text(json.dumps(evaluation))
    write_card(tmp_path / "run", config)
    head, text = read(tmp_path / "run")
    assert head["pipeline_tag"] == "image-text-to-text"
    page = html(text)
    assert "<script" not in page and 'http://evil/a.png"' not in page
    assert page.count("<details>") == page.count("</details>") == 1
    assert page.count("<h1>") == 1 and page.count("<img") == 1
    assert page.count("<table>") == 3, "accuracy, main settings, all settings"


@pytest.mark.parametrize("text", ["x", "`", "'\u202e", "/a/", "\ud800"])
def test_the_size_is_bounded(tmp_path, text):
    config = made_run(tmp_path / "run")
    names = ("model", "data", "system_prompt", "prompt_template", "prompt_suffix")
    for name in names:
        setattr(config, name, text * 9000)
    config.extra_rewards = {text * 9000: 1.0}
    write_card(tmp_path / "run", config)
    read(tmp_path / "run")
    assert (tmp_path / "run" / "final" / "README.md").stat().st_size < 60_000


def test_a_run_without_evaluation_or_steps(tmp_path):
    config = made_run(tmp_path / "run", algo="sft")
    (tmp_path / "run" / "evaluation.json").unlink()
    (tmp_path / "run" / "metrics.jsonl").unlink()
    write_card(tmp_path / "run", config)
    head, text = read(tmp_path / "run")
    assert "No held-out items were evaluated." in text and "training.png" not in text
    assert "model-index" not in head and "model_name" not in head
    (tmp_path / "run" / "evaluation.json").write_text("[")
    with pytest.raises(UserError, match=r"evaluation\.json is no JSON object"):
        write_card(tmp_path / "run", config)


def test_the_license_of_the_base_is_kept(tmp_path, hub):
    base = tmp_path / "base"
    base.mkdir()
    (base / "README.md").write_text("---\nlicense: other\nlicense_name: research\n---\n# Base\n")
    found = {"license": "other", "license_name": "research"}
    assert base_license(str(base)) == found
    assert card_of(tmp_path / "run", model=str(base))[0].items() >= found.items()
    hub.cards["owner/base"] = {"license": "apache-2.0"}
    assert base_license("owner/base") == {"license": "apache-2.0"}
    (base / "README.md").write_text("---\nlicense: [1\n---\n")
    assert base_license(str(base)) == base_license("owner/unknown") == {}


def test_names_on_the_hub(tmp_path, monkeypatch):
    assert hub_name("Qwen/Qwen2-VL-2B-Instruct") == "Qwen/Qwen2-VL-2B-Instruct"
    (tmp_path / "models" / "qwen").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for local in ("models/qwen", "tiny", "drawn", "/a/b", "~/a", "./a", "../a", "a/b/c", "a/b c"):
        assert hub_name(local) is None


def test_the_picture_has_a_panel_for_each_metric():
    steps = np.arange(50.0)
    columns = {"step": steps, "reward": steps, "beta": steps, "loss": steps}
    assert list(panels(columns)) == ["reward", "beta"]
    assert list(panels(columns | {"beta": 0 * steps})) == ["reward"]
    assert list(panels({"step": steps, "loss": steps})) == ["loss"]
    assert not panels({"step": steps[:0], "loss": steps[:0]})
    assert not panels({"step": steps, "reward": np.full(50, np.nan)})

    def drawn(columns):
        return Image.open(io.BytesIO(training_picture(columns))).convert("RGB")

    both = drawn(columns)
    assert both.width == 2 * drawn({"step": steps, "loss": steps}).width
    assert drawn(columns | {"beta": steps[::-1]}).tobytes() != both.tobytes()
