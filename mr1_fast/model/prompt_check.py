"""A first prompt with a model's own template, tokenizer and image processor, when it is loaded.

They come with the model, from whoever made it, and each is a small program: a template of Jinja, a
regular expression that splits text, numbers to which images are scaled. The first prompt is made in
bounded time and memory (bounded.py). transformers renders templates in Jinja's sandbox, from which
nothing of Python can be reached. What a template does with other texts later is not bounded.
"""

from PIL import Image
from transformers import PretrainedConfig

from ..bounded import Refused, bounded
from ..errors import UserError, shortened
from .processor import Processor
from .prompt_text import PromptText

QUESTION = "Which of the 12 angles is larger, 3x + 20° or x²?\nAnswer with a number: 5."
"""The text of the first prompt."""
SIDE = 128
"""Pixels along each side of its image."""
LONGEST_PROMPT = 100_000
"""The most characters that a template may write around that text."""
CAUSES = {
    "template": "repair or replace its chat template",
    "tokens": "download its tokenizer again",
    "image": "download its preprocessor_config.json again",
}
"""The ways out, by the part of the first prompt that was not made."""


def check_prompts(name: str, processor: Processor, description: PretrainedConfig) -> None:
    """Raise UserError unless a model's files make the prompt of a question, with its image if the
    model reads images."""
    part = "template"
    try:
        fault = bounded(lambda: _template_fault(processor))
        if not fault:
            part = "tokens"
            fault = bounded(lambda: _token_fault(processor))
        if not fault and processor.image_processor is not None:
            part = "image"
            fault = bounded(lambda: _image_fault(processor, description))
    except Refused as error:
        fault = f"cannot be used ({shortened(error, 200)})"
    if fault:
        what = {"template": "chat template", "tokens": "tokenizer", "image": "image processor"}
        raise UserError(f"the {what[part]} of model {name} {fault}: {CAUSES[part]}.")


def _messages(processor: Processor) -> list[dict]:
    """Return a question as the template gets it."""
    image = [{"type": "image"}] if processor.image_processor is not None else []
    return [{"role": "user", "content": [*image, {"type": "text", "text": QUESTION}]}]


def _template_fault(processor: Processor) -> str:
    """Say what is wrong with the text that the template writes; "" if nothing is."""
    written = PromptText(processor).written(_messages(processor))
    if QUESTION not in written:
        return "leaves out the text of the user"
    if len(written) > LONGEST_PROMPT:
        return f"writes {len(written):,} characters around a question"
    if processor.image_processor is None:
        return ""
    images = written.count(processor.image_token)
    return "" if images == 1 else f"writes {images} images for one"


def _token_fault(processor: Processor) -> str:
    """Say what is wrong with the token ids of a prompt; "" if nothing is."""
    text = PromptText(processor)
    written = text.written(_messages(processor))
    ids = text.ids(written, [1] if processor.image_processor is not None else [])
    if not all(isinstance(each, int) and each >= 0 for each in ids):
        return "has no ids for its own control tokens"
    return "" if text.text_ids(QUESTION) else "makes no tokens of a text"


def _image_fault(processor: Processor, description: PretrainedConfig) -> str:
    """Say what is wrong with the patches that are made of an image; "" if nothing is."""
    images, vision = processor.image_processor, description.vision_config
    for ours, theirs in (
        ("patch_size", "patch_size"),
        ("merge_size", "spatial_merge_size"),
        ("temporal_patch_size", "temporal_patch_size"),
    ):
        sizes = getattr(images, ours), getattr(vision, theirs)
        if sizes[0] != sizes[1]:
            return f"has {ours} = {shortened(sizes[0], 40)}, but the model {sizes[1]}"
    encoded = images(images=[Image.new("RGB", (SIDE, SIDE), "white")], return_tensors="pt")
    pixels, grid = encoded["pixel_values"], encoded["image_grid_thw"]
    channels = getattr(vision, "in_channels", 3)
    width = channels * vision.temporal_patch_size * vision.patch_size**2
    if tuple(pixels.shape) != (int(grid.prod()), width) or not pixels.isfinite().all():
        return f"makes pixels of the shape {tuple(pixels.shape)}, or some that are not finite"
    return ""
