"""What TRL's own tests load from the hub, made here as folders: small models, and its data."""

import runpy
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch
import transformers
from datasets import DatasetDict, disable_progress_bars
from trl import chat_template_utils

from mr1_fast.model.families import FAMILIES
from mr1_fast.model.processor import ImageTextProcessor
from mr1_fast.model.tiny import family_config, family_processor

TEMPLATES = Path(chat_template_utils.__file__).parent / "chat_templates"
TEXT = {
    "Qwen2ForCausalLM-2.5": "qwen2_5", "Qwen3ForCausalLM": "qwen3", "Qwen3MoeForCausalLM": "qwen3",
    "LlamaForCausalLM-3.2": "llama3_2", "MistralForCausalLM-0.2": "qwen2_5",
    "Gemma2ForCausalLM": "gemma", "GptOssForCausalLM": "gptoss", "Cohere2ForCausalLM": "cohere2",
    "Glm4MoeForCausalLM": "glm4moe", "Qwen2ForSequenceClassification-2.5": "qwen2_5",
    "Qwen3ForSequenceClassification": "qwen3", "LlamaForSequenceClassification-3.2": "llama3_2",
}  # fmt: skip
"""Names of models, each with TRL's chat template for it. All have the tokenizer of ours."""
VISION = {
    "Qwen2VLForConditionalGeneration": "qwen2_vl",
    "Qwen2_5_VLForConditionalGeneration": "qwen2_5_vl",
}
"""Names of models, each with its family."""
SIZES = {
    "hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 4, "moe_intermediate_size": 16, "num_experts_per_tok": 2,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "first_k_dense_replace": 1,
}  # fmt: skip

ROWS = 6
"""Rows of data that are kept: with all 17, most tests train for 51 steps."""


def make_hub(scripts: Path) -> None:
    """Make `trl-internal-testing/…` in the current folder; `scripts` are those of TRL's sources."""
    disable_progress_bars()
    hub = Path("trl-internal-testing")
    torch.manual_seed(0)
    for name, template in TEXT.items():
        _make_text_model(hub / f"tiny-{name}", name.partition("-")[0], template)
    for name, family in VISION.items():
        processor = family_processor(FAMILIES[family])
        model = getattr(transformers, name)(family_config(processor, FAMILIES[family]))
        model.bfloat16().save_pretrained(hub / f"tiny-{name}")
        processor.save_pretrained(hub / f"tiny-{name}", family)
    transformers.AutoProcessor.from_pretrained = partial(
        _load_processor, transformers.AutoProcessor.from_pretrained
    )
    DatasetDict.push_to_hub = _to_folder
    for script in scripts.glob("generate_zen*.py"):
        name = script.stem.removeprefix("generate_").removesuffix("_dataset").replace("_", "-")
        runpy.run_path(str(script))["main"](0.1, True, str(hub / name))


def _load_processor(stock: Callable, name: str, **options):
    """The processor of ours for its families, since transformers' own needs torchvision."""
    family = VISION.get(name.partition("tiny-")[2])
    if family is None:
        return stock(name, **options)
    processor = ImageTextProcessor.load(name)
    processor.save_pretrained = partial(processor.save_pretrained, family=family)
    return processor


def _make_text_model(folder: Path, kind: str, template: str) -> None:
    tokenizer = family_processor(FAMILIES["qwen2"]).tokenizer
    tokenizer.chat_template = (TEMPLATES / f"{template}.jinja").read_text()
    tokenizer.save_pretrained(folder)
    ids = {"eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model_class = getattr(transformers, kind)
    config = model_class.config_class(
        vocab_size=len(tokenizer), num_labels=1, bos_token_id=None, **ids, **SIZES
    )
    model_class(config).bfloat16().save_pretrained(folder)


def _to_folder(parts: DatasetDict, folder: str, config_name: str) -> None:
    """In the place of `push_to_hub`: files that load_dataset finds by the configuration's name."""
    for split, rows in parts.items():
        rows.select(range(min(ROWS, len(rows)))).to_parquet(
            Path(folder, config_name, f"{split}.parquet")
        )
    names = sorted(each.name for each in Path(folder).iterdir() if each.is_dir())
    configs = [
        f"- config_name: {name}\n  data_files:\n  - {{split: train, path: {name}/train.parquet}}\n"
        f"  - {{split: test, path: {name}/test.parquet}}\n"
        for name in names
    ]
    Path(folder, "README.md").write_text(f"---\nconfigs:\n{''.join(configs)}---\n")
