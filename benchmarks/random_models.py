"""Models with random weights: a size of Qwen2-VL, plain, with adapters, or with weights in 4 bits.

Nothing is downloaded, and a model in 4 bits never exists in 16, so that a 7B fits where its 4 bits
do.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from unittest import mock

import torch
from torch import nn
from transformers import AutoModelForImageTextToText, PretrainedConfig
from transformers.models.qwen2_vl import modeling_qwen2_vl

from mr1_fast.config import ModelConfig
from mr1_fast.model.known import find_model_config
from mr1_fast.model.load import with_lora
from mr1_fast.model.processor import ImageTextProcessor
from mr1_fast.model.tiny import tiny_config

RANK = 16
"""Rank of the adapters."""
ADAPTER_STD = 0.01
"""Standard deviation of B: adapters of a run that has begun."""


def model_config(
    size: str, processor: ImageTextProcessor, layers: int | None = None
) -> PretrainedConfig:
    """The configuration of `tiny`, 2B or 7B for the built-in models' processor.

    With at most so many `layers`, the vocabulary is the processor's and the vision tower has one
    block: what is measured are the layers, and a CPU gets through it.
    """
    if size == "tiny":
        config = tiny_config(processor)
    else:
        config = find_model_config(f"Qwen/Qwen2-VL-{size}-Instruct")
    tokens = {
        "image": "image_pad",
        "video": "video_pad",
        "vision_start": "vision_start",
        "vision_end": "vision_end",
    }
    for name, token in tokens.items():
        token_id = processor.tokenizer.convert_tokens_to_ids(f"<|{token}|>")
        setattr(config, f"{name}_token_id", token_id)
    if layers is not None:
        text = config.text_config
        text.layer_types = text.layer_types[:layers]
        text.num_hidden_layers = len(text.layer_types)
        text.vocab_size = len(processor.tokenizer)
        config.vision_config.depth = 1
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
            make = modeling_qwen2_vl.Qwen2VLDecoderLayer
            stack.enter_context(
                mock.patch.object(
                    modeling_qwen2_vl,
                    make.__name__,
                    lambda *arguments: in_four_bits(make(*arguments), dtype),
                )
            )
        model = AutoModelForImageTextToText.from_config(config, dtype=dtype)
    if lora:
        model = with_lora(model, ModelConfig(lora=True, lora_rank=RANK))
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(parameter, std=ADAPTER_STD)
    return model.eval()


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
