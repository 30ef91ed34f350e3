"""Loading a model from a local folder or the hub, and preparing it for training.

A model is trained whole or through LoRA adapters, over weights in the model's dtype or in 4 bits.
"""

import dataclasses
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType

import torch
from torch import nn
from transformers import PretrainedConfig

from ..config import ModelConfig
from ..errors import UserError, shortened
from ..files import restore_folder
from ..hub import model_access
from ..tasks import PromptFormat
from .attention import use_packed_attention
from .description import check_weights, read_description
from .device import first_line, resolve_device, resolve_dtype
from .families import (
    auto_class,
    banned_tokens,
    base_model,
    family_of,
    lora_layers,
    unquantised,
    vision_tower,
)
from .forward import LayerRun
from .joined_weights import join_weights
from .layer_stream import layers
from .model_files import check_weight_files, tensor_shapes
from .patches import use_patch_projection
from .policy import Policy
from .processor import Processor
from .processor import load_processor as load_processor_files
from .prompt import PromptEncoder
from .prompt_check import check_prompts
from .saved_adapter import (
    ADAPTER_WEIGHTS,
    adapter_base,
    adapter_folder,
    check_patterns,
    earlier_names,
    settings_for_peft,
    with_todays_name,
)

RUST_PANIC = "PanicException"
"""What a library in Rust raises, such as tokenizers, where it meets what it does not expect; it is
no Exception."""

MOST_ENDS = 64
"""How many tokens may end an answer."""


def make_policy(
    model: nn.Module,
    processor: Processor,
    config: ModelConfig,
    prompt_format: PromptFormat | None = None,
) -> Policy:
    """Prepare a loaded model for training on prompts of a format.

    Gives it packed attention, and adapters where the settings ask for them, and moves it to its
    device. The vision tower is frozen if that is set. With `recompute` auto, all layers are
    recomputed until a memory plan says otherwise.

    Raises UserError for adapters without the package peft.
    """
    base = base_model(model)
    use_packed_attention(base)
    use_patch_projection(base)

    # bitsandbytes has already placed a 4-bit model, and its integers have no gradients.
    if not config.load_in_4bit:
        model.requires_grad_(True).to(resolve_device(config))
        if tower := vision_tower(model):
            tower.requires_grad_(not config.freeze_vision)
    has_adapters = base is not model
    if config.lora and not has_adapters:
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
    policy = Policy(model.train(), processor, encode, run, adapters_go_on=has_adapters)
    if config.recompute != "none":
        policy.recompute_all()
    return policy


def load_pretrained(config: ModelConfig) -> tuple[nn.Module, Processor]:
    """Load the model and its processor from a local folder or the hub.

    A folder with an adapter gives the model under it, with the adapter merged into 16-bit weights;
    over 4-bit weights it lies on top, and with `lora` training goes on with it. Raises UserError,
    which names `model` and the way out, for whatever cannot be loaded.
    """
    name = config.model
    restore_folder(Path(name))
    if base := adapter_base(name):
        model, processor = load_pretrained(dataclasses.replace(config, model=base))
        return with_saved_adapter(model, config), processor
    with _loading(name):
        return _read(name, config)


def load_processor(config: ModelConfig) -> Processor:
    """Load the processor alone of a model in a local folder or on the hub.

    Raises UserError as load_pretrained does.
    """
    name = config.model
    restore_folder(Path(name))
    if base := adapter_base(name):
        return load_processor(dataclasses.replace(config, model=base))
    with _loading(name):
        description = read_description(name)
        return _read_processor(name, description)


@contextmanager
def _loading(name: str) -> Iterator[None]:
    """Turn whatever transformers raises for the model `name` into one sentence."""
    try:
        with model_access(name):
            yield
    except (UserError, torch.OutOfMemoryError):
        raise
    except BaseException as error:  # files that do not fit together fail in many ways
        if not isinstance(error, Exception) and type(error).__name__ != RUST_PANIC:
            raise
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


def _read(name: str, config: ModelConfig) -> tuple[nn.Module, Processor]:
    """Read model and processor with transformers, and check that they belong together."""
    description = read_description(name)
    check_weights(name, description)
    processor = _read_processor(name, description)
    check_weight_files(name, description)
    options = dict(
        dtype=resolve_dtype(config), output_loading_info=True, **_four_bit(config, description)
    )
    model, info = auto_class(description).from_pretrained(
        name, config=description, trust_remote_code=False, use_safetensors=True, **options
    )
    if info["missing_keys"]:
        raise ValueError(f"it has no weights for {min(info['missing_keys'])}")
    _check_ends(name, model)

    for module in model.modules():
        # The product that bitsandbytes uses on CPUs with AVX-512 has no backward pass.
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return model, processor


def _check_ends(name: str, model: nn.Module) -> None:
    """Raise UserError unless the tokens that end an answer, by a model's own files, are tokens."""
    ends = getattr(getattr(model, "generation_config", None), "eos_token_id", None)
    rows = model.config.get_text_config().vocab_size
    each = ends if isinstance(ends, list) else [ends] * (ends is not None)
    if len(each) > MOST_ENDS or not all(type(end) is int and 0 <= end < rows for end in each):
        raise UserError(
            f"model {name} has eos_token_id = {shortened(ends, 40)} in its generation_config.json "
            f"or config.json, which must be ids of up to {MOST_ENDS} tokens: correct it there."
        )


def _read_processor(name: str, description: PretrainedConfig) -> Processor:
    """Read a model's processor, and check that it is the model's own and can write prompts."""
    processor = load_processor_files(name, description.model_type)
    is_its_own = processor.image_token_id == getattr(description, "image_token_id", None)
    # Models of text alone have no such id. Embeddings are often padded to more rows than tokens.
    tokenizer, rows = processor.tokenizer, description.get_text_config().vocab_size
    if not is_its_own or len(tokenizer) > rows or not tokenizer.encode("1"):
        raise ValueError("its tokenizer is not there, or not the model's")
    if not all(each in range(rows) for each in banned_tokens(description)):
        raise UserError(
            f"model {name} has video_token_id = {shortened(description.video_token_id, 40)} in its "
            "config.json, which is none of its tokens: copy the original config.json of the model "
            "into its folder."
        )
    if not processor.chat_template:
        raise UserError(
            f"model {name} has no chat template, as many base models have none: choose its "
            "Instruct version, or put the template as chat_template.jinja into a folder of the "
            "model and pass that."
        )
    check_prompts(name, processor, description)
    return processor


def with_saved_adapter(model: nn.Module, config: ModelConfig) -> nn.Module:
    """Put the adapter in the folder `config.model` on the model that it belongs to.

    It is merged into 16-bit weights in place, and laid on top of 4-bit weights. Raises UserError
    for an adapter that does not fit, also one of another rank than `lora_rank` where it is trained.
    """
    peft, folder = _peft(), adapter_folder(config.model)
    settings = settings_for_peft(folder)
    check_patterns(folder, settings, [name for name, _ in model.named_modules()])
    try:
        lora = peft.LoraConfig(**settings, init_lora_weights=True)
        lora.inference_mode = not config.lora
        names = earlier_names(family_of(model.config).stored_names)
        model = peft.PeftModel.from_pretrained(
            model,
            folder,
            is_trainable=config.lora,
            config=lora,
            key_mapping=names,
            use_safetensors=True,
        )
        _check_tensors(peft, model, folder, names)
    except (UserError, torch.OutOfMemoryError):
        raise
    except Exception as error:  # files that do not fit together fail in many ways
        reason = shortened(" ".join(str(error).split()), 200)
        raise UserError(
            f"the adapter {folder} does not fit its model ({reason}): train it again, "
            "or correct base_model_name_or_path in its adapter_config.json."
        ) from error
    if not config.load_in_4bit:
        return model.merge_and_unload()
    rank = model.peft_config["default"].r
    if config.lora and rank != config.lora_rank:
        raise UserError(
            f"lora_rank is {config.lora_rank}, but training goes on with the adapter {folder} of "
            f"rank {rank}: pass --lora-rank {rank}."
        )
    return model


def _check_tensors(
    peft: ModuleType, model: nn.Module, folder: Path, names: Mapping[str, str]
) -> None:
    """Raise UserError unless an adapter's file holds just the tensors that the adapter has.

    It may hold the model's embeddings, too, as PEFT stores them with a longer vocabulary. `names`
    are those that modules had in earlier versions.
    """
    keys = tensor_shapes(f"the adapter {folder}", folder / ADAPTER_WEIGHTS).keys()
    stored = {with_todays_name(key, names) for key in keys}
    needed = peft.get_peft_model_state_dict(model, save_embedding_layers=False).keys()
    allowed = peft.get_peft_model_state_dict(model, save_embedding_layers=True).keys()
    if odd := (needed - stored) | (stored - allowed):
        raise UserError(
            f"the adapter {folder} has other tensors than its settings say, such as "
            f"{shortened(min(odd), 80)}: train or copy it again."
        )


def with_lora(model: nn.Module, config: ModelConfig) -> nn.Module:
    """Wrap the model with adapters on every linear layer of its language model.

    Raises UserError without the package peft.
    """
    peft = _peft()
    alpha = 2 * config.lora_rank
    lora = peft.LoraConfig(
        r=config.lora_rank, lora_alpha=alpha, target_modules=lora_layers(model.config)
    )
    return peft.get_peft_model(model, lora)


def _peft() -> ModuleType:
    """Return the package peft; UserError where it is not installed."""
    try:
        import peft
    except ImportError as error:
        raise UserError("lora needs the package peft: pip install 'mr1_fast[lora]'.") from error
    return peft


def _four_bit(config: ModelConfig, description: PretrainedConfig) -> dict:
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
        llm_int8_skip_modules=unquantised(description),
    )
    return {"quantization_config": quantization, "device_map": {"": resolve_device(config)}}
