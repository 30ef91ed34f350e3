"""Models with random weights: of any family, plain, with adapters, or with weights in 4 bits.

Nothing is downloaded, and a model in 4 bits never exists in 16, so that a 7B fits where its 4 bits
do.
"""

import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import nn
from transformers import PretrainedConfig

from mr1_fast.config import ModelConfig
from mr1_fast.model.families import Family, auto_class, deepstack_blocks, family_of, text_model
from mr1_fast.model.known import find_model_config
from mr1_fast.model.load import with_lora
from mr1_fast.model.processor import Processor
from mr1_fast.model.tiny import BUILT_IN_MODELS, tiny_config, tiny_processor

RANK = 16
"""Rank of the adapters."""
ADAPTER_STD = 0.01
"""Standard deviation of B: adapters of a run that has begun."""


SIZES = {"2B": "Qwen2-VL-2B-Instruct", "7B": "Qwen2-VL-7B-Instruct"}
"""Short names of sizes of Qwen2-VL; other models have their names on the hub, after `Qwen/`."""


def published(size: str) -> PretrainedConfig:
    """The configuration of a published model, by its name or a size of Qwen2-VL."""
    return find_model_config(f"Qwen/{SIZES.get(size, size)}")


def tiny_of(size: str) -> str:
    """The name of the built-in model that is of the same family as the published one."""
    family = family_of(published(size))
    return next(name for name, model in BUILT_IN_MODELS.items() if model.family is family)


def processor_of(size: str) -> Processor:
    """The processor of the built-in model of the same family."""
    return tiny_processor(size if size in BUILT_IN_MODELS else tiny_of(size))


def use_token_ids(config: PretrainedConfig, processor: Processor, family: Family) -> None:
    """Make a configuration name the image tokens of a built-in model's processor."""
    if family.vision is None:
        return
    tokens = {
        "image": "image_pad",
        "video": "video_pad",
        "vision_start": "vision_start",
        "vision_end": "vision_end",
    }
    for name, token in tokens.items():
        token_id = processor.tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        setattr(config, f"{name}_token_id", token_id)


def model_config(size: str, processor: Processor, layers: int | None = None) -> PretrainedConfig:
    """The configuration of a built-in or published model for the built-in models' processor.

    size: a built-in model's name, a size of Qwen2-VL, or a name on the hub, such as Qwen3-VL-2B.

    With at most so many `layers`, the vocabulary is the processor's and the vision tower has one
    block: what is measured are the layers, and a CPU gets through it.
    """
    config = tiny_config(processor, size) if size in BUILT_IN_MODELS else published(size)
    family = family_of(config)
    use_token_ids(config, processor, family)
    if layers is None:
        return config
    text = config.get_text_config()
    text.num_hidden_layers = min(layers, text.num_hidden_layers)
    if hasattr(text, "layer_types"):
        text.layer_types = text.layer_types[:layers]
    text.vocab_size = len(processor.tokenizer)
    if family.vision is not None:
        config.vision_config.depth = 1
        if deepstack_blocks(config.vision_config):
            config.vision_config.deepstack_visual_indexes = [0]
    return config


def random_model(
    config: PretrainedConfig,
    device: str,
    dtype: torch.dtype,
    lora: bool = False,
    four_bit: bool = False,
) -> nn.Module:
    """A model in evaluation, with adapters of RANK on all linear layers if `lora`.

    four_bit: whether the linear layers of the language model are in nf4 with double quantisation.
    """
    with ExitStack() as stack:
        stack.enter_context(torch.device(device))
        if four_bit:
            make = layer_class(config)
            stack.enter_context(
                mock.patch.object(
                    sys.modules[make.__module__],
                    make.__name__,
                    lambda *arguments: in_four_bits(make(*arguments), dtype),
                )
            )
        model = auto_class(config).from_config(config, dtype=dtype)
    if lora:
        model = with_lora(model, ModelConfig(lora=True, lora_rank=RANK))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=ADAPTER_STD)
    return model.eval()


def layer_class(config: PretrainedConfig) -> type[nn.Module]:
    """The class of transformers that a model's decoder layers are of."""
    with torch.device("meta"):
        model = auto_class(config).from_config(config)
    return type(text_model(model).layers[0])


def in_four_bits(layer: nn.Module, dtype: torch.dtype) -> nn.Module:
    """Replace the linear layers in a transformer layer by bitsandbytes', with random weights."""
    from bitsandbytes.nn import Linear4bit, Params4bit

    for part in (layer.self_attn, layer.mlp):
        for name, linear in [*part.named_children()]:
            if isinstance(linear, nn.Linear):
                sizes = linear.in_features, linear.out_features, linear.bias is not None
                small = Linear4bit(*sizes, compute_dtype=dtype, quant_type="nf4", device="meta")
                small.support_avx512bf16_for_cpu = False  # as in mr1_fast.model.load
                weight = nn.init.normal_(linear.weight.data, std=0.02)
                with default_dtype(torch.float32):  # that of the table of 16 levels
                    # Moving the weight to its device is what packs it.
                    small.weight = Params4bit(weight, False, quant_type="nf4").to(weight.device)
                small.bias = linear.bias
                small._is_hf_initialized = True  # transformers would draw the packed bytes
                setattr(part, name, small)
    return layer


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Let new tensors have this dtype, inside."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
