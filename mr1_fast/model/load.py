"""Loading a policy: the built-in tiny model, a local folder or a hub name; whole, with LoRA, or in 4 bits."""

import copy
import dataclasses
import json
import os
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForImageTextToText

from ..config import ModelConfig
from ..errors import UserError
from ..hub import cache_only_without_hub
from ..loss import linear_token_logprobs
from ..types import PackedBatch
from .attention import use_packed_attention
from .forward import base_model, lm_head_weight, packed_hidden
from .patches import use_patch_projection
from .processor import ImageTextProcessor
from .prompt import PromptEncoder

FAMILIES = ("qwen2_vl", "qwen2_5_vl")
LORA_LAYERS = r".*language_model.*\.(q_proj|k_proj|v_proj|o_proj|gate_proj|up_proj|down_proj)"
"""Regular expression of the full names of the linear layers that get adapters."""


@dataclass
class Policy:
    """The model in training, with what turns examples into its inputs."""

    model: nn.Module
    processor: ImageTextProcessor
    encode: PromptEncoder

    @property
    def device(self) -> torch.device:
        """Where the model's weights are."""
        return lm_head_weight(self.model).device

    def hidden(self, batch: PackedBatch) -> torch.Tensor:
        """Final hidden states (N, D) of the batch's loss rows, which the LM head turns into logits."""
        return packed_hidden(self.model, batch)

    def logprobs(self, batch: PackedBatch, temperature: float) -> tuple[torch.Tensor, torch.Tensor]:
        """Log-probability and entropy, fp32 (N,), of each target of the batch."""
        return linear_token_logprobs(
            self.hidden(batch), lm_head_weight(self.model), batch.targets, temperature
        )


def make_policy(model: nn.Module, processor: ImageTextProcessor, config: ModelConfig) -> Policy:
    """Wrap a loaded `…ForConditionalGeneration`: packed attention, adapters, checkpointing, and the device."""
    use_packed_attention(model)
    use_patch_projection(model)
    if config.gradient_checkpointing:
        _enable_checkpointing(model, config.offload_checkpoints)
    if (
        not config.load_in_4bit
    ):  # bitsandbytes has placed a 4-bit model already, and its integers have no gradients
        model.requires_grad_(True).to(resolve_device(config))
    if config.lora:
        model = with_lora(model, config)
    encode = PromptEncoder(
        model, processor, config.max_prompt_tokens, config.max_pixels, config.shrink_images
    )
    return Policy(model.train(), processor, encode)


def load_pretrained(config: ModelConfig) -> tuple[nn.Module, ImageTextProcessor]:
    """Model and processor from a local folder or the hub; UserError names `model` and the way out."""
    name = config.model
    if base := adapter_base(name):
        model, processor = load_pretrained(dataclasses.replace(config, model=base))
        model.load_adapter(name)
        return model, processor
    try:
        with cache_only_without_hub(name):
            check_family(name, AutoConfig.from_pretrained(name).model_type)
            options = dict(
                dtype=resolve_dtype(config), output_loading_info=True, **_four_bit(config)
            )
            model, info = AutoModelForImageTextToText.from_pretrained(name, **options)
            if info["missing_keys"]:
                raise ValueError(f"it has no weights for {min(info['missing_keys'])}")
            processor = ImageTextProcessor.load(name)
            if (
                processor.image_token_id != model.config.image_token_id
                or not processor.chat_template
            ):
                raise ValueError(
                    "its tokenizer is not there, or not the model's, or has no chat template"
                )
        for module in model.modules():
            if hasattr(
                module, "support_avx512bf16_for_cpu"
            ):  # bitsandbytes' fast CPU product has no backward
                module.support_avx512bf16_for_cpu = False
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # files that do not fit together fail in many ways
        if os.path.isdir(name):
            hint = "the folder lacks a readable model, tokenizer or image processor in Hugging Face format"
        else:
            hint = "it is no local folder, and the hub did not answer with it: check the name and the network, or "
            hint += "download it elsewhere and pass the folder"
        raise UserError(f"model {name} cannot be loaded; {hint} ({_first_line(error)}).") from error
    return model, processor


def save_pretrained(policy: Policy, folder: Path) -> None:
    """Save model and processor in Hugging Face format; LoRA is merged first, or saved as an adapter over 4 bits."""
    model = policy.model
    if hasattr(model, "merge_and_unload") and not getattr(
        base_model(model), "is_loaded_in_4bit", False
    ):
        model = copy.deepcopy(model).merge_and_unload()
    model.save_pretrained(folder)
    policy.processor.save_pretrained(folder)


def resolve_device(config: ModelConfig) -> torch.device:
    """The device that `auto` means here; UserError for one that does not exist."""
    name = (
        ("cuda" if torch.cuda.is_available() else "cpu")
        if config.device == "auto"
        else config.device
    )
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise UserError(
            f"device is {name}, which torch cannot use ({_first_line(error)}): try --device cpu."
        ) from error
    return torch.device(name)


def resolve_dtype(config: ModelConfig, device_type: str | None = None) -> torch.dtype:
    """The dtype of the weights: `auto` is bfloat16 on CUDA and float32 on any other device.

    `device_type` is `cuda` or `cpu`; by default that of `config.device` on this machine.
    """
    if config.dtype == "auto":
        device_type = device_type or resolve_device(config).type
        return torch.bfloat16 if device_type == "cuda" else torch.float32
    return getattr(torch, config.dtype)


def adapter_base(name: str) -> str | None:
    """The model under the adapter in folder `name`, as a 4-bit run saves it; None where `name` holds no adapter."""
    adapter = Path(name) / "adapter_config.json"
    return json.loads(adapter.read_text())["base_model_name_or_path"] if adapter.is_file() else None


def check_family(name: str, family: str) -> None:
    """UserError unless models of `family`, transformers' model_type, can be trained."""
    if family not in FAMILIES:
        raise UserError(
            f"model {name} is a {family}, but mr1_fast trains {', '.join(FAMILIES)}: choose one."
        )


def _four_bit(config: ModelConfig) -> dict:
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
        llm_int8_skip_modules=[
            "model.visual",
            "lm_head",
        ],  # the vision tower is small and its errors reach every token
    )
    return {"quantization_config": quantization, "device_map": {"": resolve_device(config)}}


def _enable_checkpointing(model: nn.Module, offload: bool) -> None:
    """Recompute every layer in the backward pass from its input, which is kept on the device or in host memory."""
    # The name changed between the transformers versions that we support.
    enable = (
        getattr(model, "activation_checkpointing_enable", None)
        or model.gradient_checkpointing_enable
    )
    enable({"use_reentrant": False})
    if not offload:
        return

    def offloaded(checkpoint, function, *inputs):
        with torch.autograd.graph.save_on_cpu(pin_memory=torch.cuda.is_available()):
            return checkpoint(function, *inputs)

    for module in model.modules():
        if hasattr(module, "_gradient_checkpointing_func"):
            module._gradient_checkpointing_func = partial(
                offloaded, module._gradient_checkpointing_func
            )


def with_lora(model: nn.Module, config: ModelConfig) -> nn.Module:
    """The model with adapters on every linear layer of its language model; UserError without peft."""
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise UserError("lora needs the package peft: pip install 'mr1_fast[gpu]'.") from error
    alpha = 2 * config.lora_rank
    lora = LoraConfig(r=config.lora_rank, lora_alpha=alpha, target_modules=LORA_LAYERS)
    return get_peft_model(model, lora)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0].rstrip(".")
