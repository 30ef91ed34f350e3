"""Encoding an Example as the token ids, image patches and M-RoPE positions that the model sees."""

import torch
from PIL import Image
from torch import nn

from ..errors import UserError
from ..tasks import format_problem
from ..types import Example, Prompt
from .forward import base_model
from .processor import ImageTextProcessor


class PromptEncoder:
    """Encodes examples with a model's processor, within limits that the user sets.

    `max_prompt_tokens` limits the text and image tokens of a prompt, `max_pixels` the width ×
    height of an image. A prompt is never cut: a longer one raises UserError. So does a larger
    image, unless `shrink_images` is true.
    """

    def __init__(
        self,
        model: nn.Module,
        processor: ImageTextProcessor,
        max_prompt_tokens: int = 1024,
        max_pixels: int = 401_408,
        shrink_images: bool = False,
    ):
        self.inner = base_model(model).model
        self.processor = processor
        self.max_prompt_tokens = max_prompt_tokens
        self.max_pixels = max_pixels
        self.shrink_images = shrink_images

    def __call__(self, example: Example) -> Prompt:
        """Encode one example; the tensors are on the CPU."""
        return self.many([example])[0]

    def many(self, examples: list[Example]) -> list[Prompt]:
        """Encode examples in one call of the processor; the tensors are on the CPU.

        That takes half the time of one call per example.
        """
        if not examples:
            return []
        images = [self._allowed(image, example) for example in examples for image in example.images]
        encoded = self.processor(
            text=[self._text(example) for example in examples],
            images=images or None,
            padding=len(examples) > 1,
            return_tensors="pt",
        )
        present = encoded["attention_mask"].bool()
        for example, length in zip(examples, present.sum(1).tolist(), strict=True):
            if length > self.max_prompt_tokens:
                raise UserError(
                    f"the prompt of example {example.key!r} has {length} tokens, more than "
                    f"max_prompt_tokens = {self.max_prompt_tokens}: raise --max-prompt-tokens, or "
                    "lower --max-pixels with --shrink-images true (a prompt is never cut, since a "
                    "cut may fall inside an image)."
                )
        return self._split(examples, encoded, present, self._positions(encoded))

    def _allowed(self, image: Image.Image, example: Example) -> Image.Image:
        """Return the image, shrunk if it is too large; UserError if the settings forbid that."""
        if image.width * image.height <= self.max_pixels:
            return image
        if self.shrink_images:
            return _shrunk(image, self.max_pixels)
        raise UserError(
            f"an image of example {example.key!r} has {image.width}×{image.height} pixels, more "
            f"than max_pixels = {self.max_pixels}: raise --max-pixels, or pass --shrink-images "
            "true."
        )

    def _text(self, example: Example) -> str:
        """Return the prompt as the chat template writes it, up to where the assistant answers."""
        content = [{"type": "image"} for _ in example.images]
        content.append({"type": "text", "text": format_problem(example)})
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )

    def _positions(self, encoded: dict[str, torch.Tensor]) -> torch.Tensor:
        """Return M-RoPE positions (3, B, L); those of padding mean nothing."""
        if "image_grid_thw" not in encoded:
            return (encoded["attention_mask"].cumsum(1) - 1).expand(3, -1, -1)
        names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
        return self.inner.get_rope_index(**{name: encoded[name] for name in names})[0]

    def _split(
        self, examples, encoded, present: torch.Tensor, positions: torch.Tensor
    ) -> list[Prompt]:
        """Make a Prompt of each row: without its padding, and with its own images alone."""
        grids = encoded.get("image_grid_thw", torch.zeros(0, 3, dtype=torch.int64))
        patches = encoded.get("pixel_values", torch.zeros(0, 0)).split(grids.prod(1).tolist())
        prompts = []
        first_image = 0
        for row, (example, inside) in enumerate(zip(examples, present, strict=True)):
            own = slice(first_image, first_image + len(example.images))
            first_image = own.stop
            ids = encoded["input_ids"][row, inside]
            places = positions[:, row, inside]
            prompts.append(
                Prompt(
                    input_ids=ids,
                    position_ids=places,
                    next_position=int(places.max()) + 1,
                    pixel_values=torch.cat(patches[own]) if example.images else None,
                    image_grid_thw=grids[own] if example.images else None,
                    num_image_tokens=int((ids == self.processor.image_token_id).sum()),
                )
            )
        return prompts


def _shrunk(image: Image.Image, max_pixels: int) -> Image.Image:
    """Scale the image, near its aspect ratio, to at most `max_pixels` and to whole 28×28 image
    tokens.

    A side never becomes shorter than one image token.
    """
    scale = (max_pixels / (image.width * image.height)) ** 0.5
    width, height = (max(28, int(side * scale) // 28 * 28) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)
