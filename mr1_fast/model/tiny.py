"""The built-in models, `tiny` and `small`, which are made without downloads.

They are real Qwen2-VL models, of 0.9M and 16.8M parameters.
"""

from dataclasses import dataclass
from functools import lru_cache

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import Qwen2TokenizerFast, Qwen2VLConfig, Qwen2VLForConditionalGeneration
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from ..tasks import DRAWN_TASKS, format_problem, format_solution
from .processor import ImageTextProcessor

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
class BuiltInSize:
    """The settings in which the built-in models differ."""

    hidden_size: int
    layers: int
    """Number of decoder layers."""
    heads: int
    """Number of attention heads, both of the language model and of the vision tower."""
    mrope_section: tuple[int, int, int]
    """Pairs of a head's channels that turn with the temporal, height and width position."""
    vision_width: int
    vision_blocks: int


BUILT_IN_SIZES = {
    "tiny": BuiltInSize(
        hidden_size=128,
        layers=3,
        heads=4,
        mrope_section=(4, 6, 6),
        vision_width=64,
        vision_blocks=2,
    ),
    "small": BuiltInSize(
        hidden_size=384,
        layers=8,
        heads=6,
        mrope_section=(8, 12, 12),
        vision_width=192,
        vision_blocks=4,
    ),
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


def tiny_processor() -> ImageTextProcessor:
    """Make the processor of the built-in models.

    Its tokenizer is a byte-level BPE trained on the drawn tasks' own sentences, with Qwen2-VL's
    special tokens; its image processor is Qwen2-VL's.
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
    bpe.train_from_iterator(_sentences(), trainer)
    tokenizer = Qwen2TokenizerFast(
        tokenizer_object=bpe,
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
    return ImageTextProcessor(
        Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=401_408),
        tokenizer,
        chat_template=CHAT_TEMPLATE,
    )


def tiny_config(processor: ImageTextProcessor, size: str = "tiny") -> Qwen2VLConfig:
    """Return the configuration of a built-in model, by its name in BUILT_IN_SIZES."""
    tokenizer = processor.tokenizer
    token_id = tokenizer.convert_tokens_to_ids
    sizes = BUILT_IN_SIZES[size]
    return Qwen2VLConfig(
        text_config=dict(
            vocab_size=len(tokenizer),
            hidden_size=sizes.hidden_size,
            intermediate_size=3 * sizes.hidden_size,
            num_hidden_layers=sizes.layers,
            num_attention_heads=sizes.heads,
            num_key_value_heads=2,
            max_position_embeddings=1024,
            rope_parameters={
                "rope_type": "default",
                "rope_theta": 10000.0,
                "mrope_section": list(sizes.mrope_section),
            },
            bos_token_id=None,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
            tie_word_embeddings=True,
        ),
        vision_config=dict(
            depth=sizes.vision_blocks,
            embed_dim=sizes.vision_width,
            hidden_size=sizes.hidden_size,
            num_heads=sizes.heads,
            mlp_ratio=4,
            patch_size=14,
            spatial_merge_size=2,
            temporal_patch_size=2,
            in_channels=3,
        ),
        image_token_id=token_id("<|image_pad|>"),
        video_token_id=token_id("<|video_pad|>"),
        vision_start_token_id=token_id("<|vision_start|>"),
        vision_end_token_id=token_id("<|vision_end|>"),
        tie_word_embeddings=True,
    )


def tiny_model(
    processor: ImageTextProcessor, size: str = "tiny"
) -> Qwen2VLForConditionalGeneration:
    """Make a built-in model with fresh weights.

    They are drawn from torch's global generator: seed it first.
    """
    return Qwen2VLForConditionalGeneration(tiny_config(processor, size))


@lru_cache
def _sentences(per_task: int = 200) -> list[str]:
    """Return texts of every drawn task at two difficulties, for training the tokenizer.

    Drawing them takes seconds, and a process makes several processors.
    """
    sentences = []
    for task in DRAWN_TASKS.values():
        for difficulty in (1, 3):
            for index in range(per_task):
                example = task.draw("train", 0, index, difficulty)
                sentences += [
                    f"user\n{format_problem(example)}",
                    f"assistant\n{format_solution(example)}",
                ]
    return sentences
