"""Loading a model from a local folder or the hub, preparing it for training, and saving it.

A model is trained whole or through LoRA adapters, over weights in the model's dtype or in 4 bits.
"""

import copy
import dataclasses
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from ..config import ModelConfig
from ..errors import UserError
from ..files import restore_folder
from ..hub import model_access
from ..tasks import PromptFormat
from .attention import use_packed_attention
from .device import first_line, resolve_device, resolve_dtype
from .forward import LayerRun, base_model
from .joined_weights import join_weights
from .layer_stream import layers
from .patches import use_patch_projection
from .policy import Policy
from .processor import ImageTextProcessor
from .prompt import PromptEncoder

FAMILIES = ("qwen2_vl", "qwen2_5_vl")
"""The families of models that can be trained, as transformers' `model_type` names them."""
LORA_LAYERS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
"""Regular expression of the full names of the linear layers that get adapters."""


def make_policy(
    model: nn.Module,
    processor: ImageTextProcessor,
    config: ModelConfig,
    prompt_format: PromptFormat | None = None,
) -> Policy:
    """Prepare a loaded `…ForConditionalGeneration` for training on prompts of a format.

    Gives it packed attention, and adapters where the settings ask for them, and moves it to its
    device. The vision tower is frozen if that is set. With `recompute` auto, all layers are
    recomputed until a memory plan says otherwise.

    Raises UserError for adapters without the package peft.
    """
    use_packed_attention(model)
    use_patch_projection(model)

    # bitsandbytes has already placed a 4-bit model, and its integers have no gradients.
    if not config.load_in_4bit:
        model.requires_grad_(True).to(resolve_device(config))
        model.model.visual.requires_grad_(not config.freeze_vision)
    if config.lora:
        model = with_lora(model, config)
    if config.fused_layers:
        join_weights(layers(model))

    encode = PromptEncoder(
        model,
        processor,
        config.max_prompt_tokens,
        config.max_pixels,
        config.shrink_images,
        prompt_format,
    )
    run = LayerRun(fused=config.fused_layers, offload=config.offload_checkpoints)
    policy = Policy(model.train(), processor, encode, run)
    if config.recompute != "none":
        policy.recompute_all()
    return policy


def load_pretrained(config: ModelConfig) -> tuple[nn.Module, ImageTextProcessor]:
    """Load the model and its processor from a local folder or the hub.

    A folder with an adapter, as a 4-bit run saves it, gives the model under it with the adapter on
    top. Raises UserError, which names `model` and the way out, for whatever cannot be loaded.
    """
    name = config.model
    restore_folder(Path(name))
    if base := adapter_base(name):
        model, processor = load_pretrained(dataclasses.replace(config, model=base))
        model.load_adapter(name)
        return model, processor
    with _loading(name):
        return _read(name, config)


def load_processor(config: ModelConfig) -> ImageTextProcessor:
    """Load the processor alone of a model in a local folder or on the hub.

    Raises UserError as load_pretrained does.
    """
    name = config.model
    restore_folder(Path(name))
    if base := adapter_base(name):
        return load_processor(dataclasses.replace(config, model=base))
    with _loading(name):
        return ImageTextProcessor.load(name)


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Turn whatever transformers raises for the model `name` into one sentence."""
    try:
        with model_access(name):
            yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # files that do not fit together fail in many ways
        if os.path.isdir(name):
            hint = (
                "the folder lacks a readable model, tokenizer or image processor in Hugging Face "
                "format"
            )
        else:
            hint = (
                "it is no local folder, and the hub did not answer with it: check the name and the "
                "network, or download it elsewhere and pass the folder"
            )
        raise UserError(f"model {name} cannot be loaded; {hint} ({first_line(error)}).") from error


def _read(name: str, config: ModelConfig) -> tuple[nn.Module, ImageTextProcessor]:
    """Read model and processor with transformers, and check that they belong together."""
    check_family(name, AutoConfig.from_pretrained(name).model_type)
    options = dict(dtype=resolve_dtype(config), output_loading_info=True, **_four_bit(config))
    model, info = AutoModelForImageTextToText.from_pretrained(name, **options)
    if info["missing_keys"]:
        raise ValueError(f"it has no weights for {min(info['missing_keys'])}")

    processor = ImageTextProcessor.load(name)
    is_its_own = processor.image_token_id == model.config.image_token_id
    if not is_its_own or not processor.chat_template:
        raise ValueError("its tokenizer is not there, or not the model's, or has no chat template")

    for module in model.modules():
        # The product that bitsandbytes uses on CPUs with AVX-512 has no backward pass.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model, processor


def save_pretrained(policy: Policy, folder: Path) -> None:
    """Save model and processor in Hugging Face format.

    LoRA is merged into the weights first; over 4-bit weights, the adapter alone is saved.
    """
    model = policy.model
    has_adapter = hasattr(model, "merge_and_unload")
    if has_adapter and not getattr(base_model(model), "is_loaded_in_4bit", False):
        model = copy.deepcopy(model).merge_and_unload()
    model.save_pretrained(folder)
    policy.processor.save_pretrained(folder)


def adapter_base(name: str) -> str | None:
    """Return the name of the model under the adapter in folder `name`, or None if it holds none."""
    adapter = Path(name) / "adapter_config.json"
    return json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.is_file() else None


def check_family(name: str, family: str) -> None:
    """Raise UserError unless models of `family`, a transformers `model_type`, can be trained."""
    if family not in FAMILIES:
        raise UserError(
            f"model {name} is a {family}, but mr1_fast trains {', '.join(FAMILIES)}: choose one."
        )


def with_lora(model: nn.Module, config: ModelConfig) -> nn.Module:
    """Wrap the model with adapters on every linear layer of its language model.

    Raises UserError without the package peft.
    """
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UserError("lora needs the package peft: pip install 'mr1_fast[gpu]'.") from error
    alpha = 2 * config.lora_rank
    lora = LoraConfig(r=config.lora_rank, lora_alpha=alpha, target_modules=LORA_LAYERS)
    return get_peft_model(model, lora)


def _four_bit(config: ModelConfig) -> dict:
    """Return the arguments of `from_pretrained` that load 4-bit weights, if they are asked for."""
    if not config.load_in_4bit:
        return {}
    try:
        import bitsandbytes  # noqa: F401
        from transformers import BitsAndBytesConfig
    except ImportError as error:
        raise UserError(
            "load_in_4bit needs the package bitsandbytes: pip install 'mr1_fast[gpu]'."
        ) from error
    quantization = BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=resolve_dtype(config),
        # The vision tower is small, and its errors reach every token.
        llm_int8_skip_modules=["model.visual", "lm_head"],
    )
    return {"quantization_config": quantization, "device_map": {"": resolve_device(config)}}
