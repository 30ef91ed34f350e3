"""How to load a trained model: the code and the commands that its card shows."""

import json
import shlex
from pathlib import Path

from ..config import TrainConfig
from ..profiles import BUILT_IN
from ..report.markdown import fence
from .metadata import adapter_place, has_weights, reads_images
from .public import public, public_name

THIS_MODEL = "path/to/final"
"""What the card calls its own model until `push_run` puts the name on the Hub in its place."""

LONGEST_PROMPT = 400
"""The most characters of a prompt in the code; a longer one is among the settings."""


def usage(config: TrainConfig, model: str, final: Path) -> str:
    """Return Markdown with code for transformers, and a line for vLLM; `model` is the base."""
    adapter = adapter_place(final)
    whole = has_weights(final) or adapter is None
    base = public_name(model)
    loaded = THIS_MODEL if whole else base
    with_images = reads_images(final)
    auto, reader = "AutoModelForCausalLM", "AutoTokenizer"
    if with_images:
        auto, reader = "AutoModelForImageTextToText", "AutoProcessor"
    lines = [f"from transformers import {auto}, {reader}"]
    if not whole:
        lines.insert(0, "from peft import PeftModel")
    lines += [
        "",
        f"model = {auto}.from_pretrained(",
        f'    {_quoted(loaded)}, dtype="auto", device_map="auto"',
        ")",
    ]
    folder = "" if adapter in (None, ".") else adapter
    if not whole:
        where = f', subfolder="{folder}"' if folder else ""
        lines.append(f'model = PeftModel.from_pretrained(model, "{THIS_MODEL}"{where})')
    lines += [
        f'processor = {reader}.from_pretrained("{THIS_MODEL}")',
        "",
        *_conversation(config, with_images),
        "inputs = processor.apply_chat_template(",
        "    messages, add_generation_prompt=True, tokenize=True, return_dict=True,",
        '    return_tensors="pt",',
        ").to(model.device)",
        f"output = model.generate(**inputs, max_new_tokens={config.max_new_tokens})",
        'answer = output[:, inputs["input_ids"].shape[1] :]',
        "print(processor.batch_decode(answer, skip_special_tokens=True)[0])",
    ]
    parts = [fence("\n".join(lines), "python")]
    if model not in BUILT_IN:
        parts.append(f"With vLLM:\n\n{fence(_vllm(config, whole, base, folder), 'bash')}")
    return "\n".join(parts)


def _conversation(config: TrainConfig, with_images: bool) -> list[str]:
    """Lines that make `messages` as the prompts of the training were made."""
    suffix = config.prompt_suffix if config.prompt_template is None else ""
    asked = "How many circles are there?" if config.task == "counting" else "What is the answer?"
    question = f"{asked} {suffix}".strip()
    if len(question) > LONGEST_PROMPT:
        question = question[:LONGEST_PROMPT] + " …"
    lines = ["messages = ["]
    if config.system_prompt:
        system = public(config.system_prompt[:LONGEST_PROMPT])
        lines.append(f'    {{"role": "system", "content": {_quoted(system)}}},')
    if not with_images:
        content = _quoted(public(question))
        return [*lines, f'    {{"role": "user", "content": {content}}},', "]"]
    return [
        *lines,
        '    {"role": "user", "content": [',
        '        {"type": "image", "image": "picture.png"},',
        f'        {{"type": "text", "text": {_quoted(public(question))}}},',
        "    ]},",
        "]",
    ]


def _quoted(text: str) -> str:
    """A text as a literal that Python reads."""
    return json.dumps(text, ensure_ascii=False)


def _vllm(config: TrainConfig, whole: bool, base: str, folder: str) -> str:
    if whole:
        return f"vllm serve {THIS_MODEL}"
    lora = f"--enable-lora --max-lora-rank {config.lora_rank} --lora-modules"
    if folder:
        download = f"hf download {THIS_MODEL} --local-dir trained\n"
        return f"{download}vllm serve {shlex.quote(base)} {lora} trained=trained/{folder}"
    return f"vllm serve {shlex.quote(base)} {lora} trained={THIS_MODEL}"
