"""The built-in models, which are made without downloads: a tiny one in every family, and `small`.

They are real models of their families, of about 0.9M parameters, and `small` of 16.8M.
"""

from dataclasses import dataclass
from functools import cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from torch import nn
from transformers import PretrainedConfig, PreTrainedTokenizerBase, Qwen2TokenizerFast
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from ..tasks import DRAWN_TASKS, format_problem, format_solution
from .families import FAMILIES, BuiltInSize, Family, TokenIds, auto_class
from .processor import ImageTextProcessor, Processor, TextProcessor

SPECIAL_TOKENS = (
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<|vision_pad|>",
    "<|image_pad|>",
    "<|video_pad|>",
)
TAGS = ("<think>", "</think>", "<answer>", "</answer>")


@dataclass(frozen=True)
class BuiltInModel:
    """A built-in model."""

    family: Family
    size: BuiltInSize


TINY = BuiltInSize(hidden_size=128, layers=3, heads=4, vision_width=64, vision_blocks=2)
SMALL = BuiltInSize(hidden_size=384, layers=8, heads=6, vision_width=192, vision_blocks=4)
BUILT_IN_MODELS = {
    "tiny": BuiltInModel(FAMILIES["qwen2_vl"], TINY),
    "small": BuiltInModel(FAMILIES["qwen2_vl"], SMALL),
    "tiny-qwen2_5vl": BuiltInModel(FAMILIES["qwen2_5_vl"], TINY),
    "tiny-qwen3vl": BuiltInModel(FAMILIES["qwen3_vl"], TINY),
    "tiny-text": BuiltInModel(FAMILIES["qwen3"], TINY),
}
"""The built-in models by name."""

CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message.role }}\n"
    "{% if message.content is string %}{{ message.content }}{% else %}"
    "{% for part in message.content %}"
    "{% if part.type == 'image' %}<|vision_start|><|image_pad|><|vision_end|>"
    "{% else %}{{ part.text }}{% endif %}"
    "{% endfor %}{% endif %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
QWEN2_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
"""Qwen2's pre-tokenization: words with their leading space, and every digit on its own."""


def tiny_processor(name: str = "tiny") -> Processor:
    """Make the processor of a built-in model, by its name in BUILT_IN_MODELS."""
    return family_processor(BUILT_IN_MODELS[name].family)


def family_processor(family: Family) -> Processor:
    """Make a processor for built-in models of a family, whose image processor is Qwen2-VL's."""
    tokenizer = _tokenizer(has_images=family.vision is not None)
    if family.vision is None:
        return TextProcessor(tokenizer)
    patch, merge = family.vision.patch_size, family.vision.merge_size
    side = patch * merge
    images = Qwen2VLImageProcessorPil(
        min_pixels=side**2, max_pixels=512 * side**2, patch_size=patch
    )
    return ImageTextProcessor(images, tokenizer, chat_template=CHAT_TEMPLATE)


@cache
def _trained_bpe(has_images: bool) -> str:
    """Train a byte-level BPE on the sentences of the drawn tasks that its models can see.

    That takes a third of a second, so a process does it once.
    """
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(QWEN2_PATTERN), behavior="isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=700, initial_alphabet=pre_tokenizers.ByteLevel.alphabet(), show_progress=False
    )
    bpe.train_from_iterator(_sentences(has_images), trainer)
    return bpe.to_str()


def _tokenizer(has_images: bool) -> PreTrainedTokenizerBase:
    """Make the tokenizer of the built-in models with images, or of those of text alone.

    It has Qwen2-VL's special tokens. Digits and signs are tokens of both.
    """
    tokenizer = Qwen2TokenizerFast(
        tokenizer_object=Tokenizer.from_str(_trained_bpe(has_images)),
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        unk_token=None,
        bos_token=None,
        extra_special_tokens=list(SPECIAL_TOKENS),
        padding_side="left",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.add_tokens([AddedToken(tag, normalized=False) for tag in TAGS])
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def tiny_config(processor: Processor, name: str = "tiny") -> PretrainedConfig:
    """Return the configuration of a built-in model, by its name in BUILT_IN_MODELS."""
    model = BUILT_IN_MODELS[name]
    return family_config(processor, model.family, model.size)


def family_config(
    processor: Processor, family: Family, size: BuiltInSize = TINY
) -> PretrainedConfig:
    """Return a configuration of a family in the size of a built-in model."""
    tokenizer = processor.tokenizer
    token_id = tokenizer.convert_tokens_to_ids
    ids = TokenIds(
        vocabulary=len(tokenizer),
        end=tokenizer.eos_token_id,
        padding=tokenizer.pad_token_id,
        image=token_id("<|image_pad|>"),
        video=token_id("<|video_pad|>"),
        vision_start=token_id("<|vision_start|>"),
        vision_end=token_id("<|vision_end|>"),
    )
    return family.config(family.built_in(size, ids))


def tiny_model(processor: Processor, name: str = "tiny") -> nn.Module:
    """Make a built-in model with fresh weights.

    They are drawn from torch's global generator: seed it first.
    """
    config = tiny_config(processor, name)
    return auto_class(config).from_config(config)


def _sentences(has_images: bool, per_task: int = 200) -> list[str]:
    """Return texts of the drawn tasks with images, or of those without, for training a tokenizer.

    They are of two difficulties, and drawn without the images, which would take seconds.
    """
    sentences, options = [], {"painted": False} if has_images else {}
    for task in DRAWN_TASKS.values():
        if task.draws_images != has_images:
            continue
        for difficulty in (1, 3):
            for index in range(per_task):
                example = task.draw("train", 0, index, difficulty, **options)
                sentences += [
                    f"user\n{format_problem(example)}",
                    f"assistant\n{format_solution(example)}",
                ]
    return sentences
