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
        images = list(example.images)
        for position, image in enumerate(images):
            if image.width * image.height > self.max_pixels and self.shrink_images:
                images[position] = _shrunk(image, self.max_pixels)
            elif image.width * image.height > self.max_pixels:
                raise UserError(
                    f"an image of example {example.key!r} has {image.width}×{image.height} pixels, more than "
                    f"max_pixels = {self.max_pixels}: raise --max-pixels, or pass --shrink-images true."
                )
        content = [{"type": "image"} for _ in example.images]
        content.append({"type": "text", "text": format_problem(example)})
        text = self.processor.apply_chat_template(
            [{"role": "user", "content": content}], tokenize=False, add_generation_prompt=True
        )
        encoded = self.processor(
            text=[text],
            images=images or None,
            return_tensors="pt",
        )
        length = encoded["input_ids"].shape[1]
        if length > self.max_prompt_tokens:
            raise UserError(
                f"the prompt of example {example.key!r} has {length} tokens, more than max_prompt_tokens = "
                f"{self.max_prompt_tokens}: raise --max-prompt-tokens, or lower --max-pixels with --shrink-images true "
                "(a prompt is never cut, since a cut may fall inside an image)."
            )
        return self._with_positions(encoded)

    def _with_positions(self, encoded: dict[str, torch.Tensor]) -> Prompt:
        input_ids = encoded["input_ids"]
        grid = encoded.get("image_grid_thw")
        if grid is None:
            positions = torch.arange(input_ids.shape[1]).expand(3, 1, -1)
        else:
            positions, _ = self.inner.get_rope_index(
                input_ids=input_ids, mm_token_type_ids=encoded["mm_token_type_ids"], image_grid_thw=grid
            )
        return Prompt(
            input_ids=input_ids[0],
            position_ids=positions[:, 0],
            next_position=int(positions.max()) + 1,
            pixel_values=encoded.get("pixel_values"),
            image_grid_thw=grid,
            num_image_tokens=int((input_ids == self.processor.image_token_id).sum()),
        )


def _shrunk(image: Image.Image, max_pixels: int) -> Image.Image:
    """The image at its aspect ratio with at most `max_pixels`, in whole image tokens of 28×28 where it has as many."""
    scale = (max_pixels / (image.width * image.height)) ** 0.5
    width, height = (max(28, int(side * scale) // 28 * 28) for side in image.size)
    return image.resize((width, height), Image.Resampling.BICUBIC)
