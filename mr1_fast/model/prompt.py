"""From an Example to the token ids, patches and M-RoPE positions that the model sees."""

import torch
from PIL import Image
from torch import nn

from ..errors import UserError
from ..tasks import format_problem
from ..types import Example, Prompt
from .forward import base_model
from .processor import ImageTextProcessor


class PromptEncoder:
    """Encodes examples with a model's processor, within limits that a user sets.

    `max_prompt_tokens` counts text and image tokens; `max_pixels` is a limit on width × height of one image.
    A prompt is never cut: a longer one is a UserError, as is a larger image unless `shrink_images`.
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
        """Encode one example. The tensors stay on the CPU."""
        return self.many([example])[0]

    def many(self, examples: list[Example]) -> list[Prompt]:
        """Encode examples in one call of the processor, which takes half the time of a call for each."""
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
                    f"the prompt of example {example.key!r} has {length} tokens, more than max_prompt_tokens = "
                    f"{self.max_prompt_tokens}: raise --max-prompt-tokens, or lower --max-pixels with --shrink-images "
                    "true (a prompt is never cut, since a cut may fall inside an image)."
                )
        return self._split(examples, encoded, present, self._positions(encoded))

    def _allowed(self, image: Image.Image, example: Example) -> Image.Image:
        """The image, smaller if need be and if that is wanted."""
        if image.width * image.height <= self.max_pixels:
            return image
        if self.shrink_images:
            return _shrunk(image, self.max_pixels)
        raise UserError(
            f"an image of example {example.key!r} has {image.width}×{image.height} pixels, more than "
            f"max_pixels = {self.max_pixels}: raise --max-pixels, or pass --shrink-images true."
        )

    def _text(self, example: Example) -> str:
        content = [{"type": "image"} for _ in example.images]
        content.append({"type": "text", "text": format_problem(example)})
        return self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )

    def _positions(self, encoded: dict[str, torch.Tensor]) -> torch.Tensor:
        """(3, B, L), of padding meaningless."""
        if "image_grid_thw" not in encoded:
            return (encoded["attention_mask"].cumsum(1) - 1).expand(3, -1, -1)
        names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
        return self.inner.get_rope_index(**{name: encoded[name] for name in names})[0]

    def _split(
        self, examples, encoded, present: torch.Tensor, positions: torch.Tensor
    ) -> list[Prompt]:
        """A Prompt of each row, without padding, and with its own images."""
        grids = encoded.get("image_grid_thw", torch.zeros(0, 3, dtype=torch.int64))
        patches = encoded.get("pixel_values", torch.zeros(0, 0)).split(grids.prod(1).tolist())
        prompts, first = [], 0
        for row, (example, inside) in enumerate(zip(examples, present, strict=True)):
            own = slice(first, first + len(example.images))
            first, ids, places = (
                own.stop,
                encoded["input_ids"][row, inside],
                positions[:, row, inside],
            )
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
    """The image at its aspect ratio with at most `max_pixels`, in whole image tokens of 28×28 where it has as many."""
    scale = (max_pixels / (image.width * image.height)) ** 0.5
    width, height = (max(28, int(side * scale) // 28 * 28) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)
