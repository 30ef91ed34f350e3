"""Encoding an Example as the token ids, image patches and M-RoPE positions that the model sees."""

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property

import torch
from torch import nn

from ..errors import UserError
from ..tasks import PromptFormat
from ..tasks.prompts import IMAGE_MARK
from ..types import Example, Prompt
from .device import first_line
from .families import base_model
from .image_size import ImageSizes
from .processor import Processor
from .prompt_text import PromptText

LONGEST_TOKEN = 256
"""More characters than a token of a vocabulary has."""


class PromptWriter:
    """Writes examples as text and token ids, within limits that the user sets.

    `max_prompt_tokens` limits the text and image tokens of a prompt, `max_pixels` the width ×
    height of an image. A prompt is never cut: a longer one raises UserError. So does an image that
    is larger, or thinner than the model takes, unless `shrink_images` is true. `prompt_format` puts
    examples into words.

    It needs a model's processor and not its weights, and may be used from several threads.
    """

    def __init__(
        self,
        processor: Processor,
        max_prompt_tokens: int = 1024,
        max_pixels: int = 401_408,
        shrink_images: bool = False,
        prompt_format: PromptFormat | None = None,
    ):
        self.processor = processor
        self.max_prompt_tokens = max_prompt_tokens
        self.max_pixels = max_pixels
        self.shrink_images = shrink_images
        self.prompt_format = prompt_format or PromptFormat()

    @cached_property
    def sizes(self) -> ImageSizes:
        """The sizes of images that are allowed."""
        return ImageSizes(self.processor.image_processor, self.max_pixels, self.shrink_images)

    @cached_property
    def text(self) -> PromptText:
        """The chat template and the tokenizer."""
        return PromptText(self.processor)

    def length(self, example: Example) -> int:
        """Return how many tokens the example's prompt has, without a look at its pixels.

        Raises UserError where encoding would.
        """
        return len(self._ids(example))

    def rendered(self, example: Example) -> str:
        """Return the text that the model reads, with each image as one image token."""
        with _named(example):
            return self.text.shown(self.text.written(self._messages(example)))

    def text_ids(self, text: str) -> list[int]:
        """Return the token ids of a text such as a solution, in which no token is special."""
        return self.text.text_ids(text)

    def _ids(self, example: Example) -> list[int]:
        """Return the prompt's token ids; UserError if the settings or the model forbid it."""
        with _named(example):
            messages = self._messages(example)
            for image in example.images:
                self.sizes.check(image.size, example.name)
            image_tokens = [self.sizes.num_tokens(image.size) for image in example.images]
            # A text of many megabytes would take minutes and gigabytes to split into tokens.
            characters = sum(len(p.get("text", "")) for m in messages for p in m["content"])
            fits = characters <= LONGEST_TOKEN * self.max_prompt_tokens
            ids = self.text.ids(self.text.written(messages), image_tokens) if fits else []
        if not fits or len(ids) > self.max_prompt_tokens:
            size = f"{len(ids)} tokens," if fits else f"{characters:,} characters, which is"
            raise UserError(
                f"the prompt of {example.name} has {size} more than "
                f"max_prompt_tokens = {self.max_prompt_tokens}: raise --max-prompt-tokens, or "
                "lower --max-pixels with --shrink-images true (a prompt is never cut, since a "
                "cut may fall inside an image)."
            )
        return ids

    def _messages(self, example: Example) -> list[dict]:
        """Return the messages that the chat template writes: the system's, if any, and the user's.

        Images stand where the text marks them, and first where it does not.
        """
        if example.images and self.processor.image_processor is None:
            raise UserError(
                f"{example.name} has an image, but the model reads text alone: choose a model that "
                "reads images, such as Qwen/Qwen3-VL-4B-Instruct, or a task and data without them."
            )
        texts = self.prompt_format.user_text(example).split(IMAGE_MARK)
        count, marks = len(example.images), len(texts) - 1
        if marks == 0:
            texts = [""] * count + texts
        elif marks != count:
            raise UserError(
                f"the prompt of {example.name} has {marks} {IMAGE_MARK} marks, but the example "
                f"has {count} images: write one mark for each image, or none to show them first."
            )
        content = []
        for index, text in enumerate(texts):
            if text:
                content.append({"type": "text", "text": text})
            if index < count:
                content.append({"type": "image"})
        messages = [{"role": "user", "content": content}]
        system = self.prompt_format.system_text(example)
        if system is not None:
            messages.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
        return messages


class PromptEncoder(PromptWriter):
    """Encodes examples as the inputs of a model; the other arguments are those of PromptWriter."""

    def __init__(
        self,
        model: nn.Module,
        processor: Processor,
        max_prompt_tokens: int = 1024,
        max_pixels: int = 401_408,
        shrink_images: bool = False,
        prompt_format: PromptFormat | None = None,
    ):
        super().__init__(processor, max_prompt_tokens, max_pixels, shrink_images, prompt_format)
        self.inner = base_model(model).model

    def __call__(self, example: Example) -> Prompt:
        """Encode one example; the tensors are on the CPU."""
        input_ids = torch.tensor(self._ids(example))
        with _named(example):
            opening = self.text.opening
        encoded = {}
        if example.images:
            with _named(example):
                fitted = [self.sizes.fit(image) for image in example.images]
                encoded = self.processor.image_processor(images=fitted, return_tensors="pt")
        grids = encoded.get("image_grid_thw")
        image_token = self.processor.image_token_id
        is_image = input_ids == (-1 if image_token is None else image_token)
        position_ids = self._positions(input_ids, is_image, grids)
        return Prompt(
            input_ids=input_ids,
            position_ids=position_ids,
            next_position=int(position_ids.max()) + 1,
            pixel_values=encoded.get("pixel_values"),
            image_grid_thw=grids,
            num_image_tokens=int(is_image.sum()),
            opening=opening,
        )

    def many(self, examples: list[Example]) -> list[Prompt]:
        """Encode examples one after the other; the tensors are on the CPU."""
        return [self(example) for example in examples]

    def _positions(
        self, ids: torch.Tensor, is_image: torch.Tensor, grids: torch.Tensor | None
    ) -> torch.Tensor:
        """Return the M-RoPE positions (3, L) of a prompt."""
        if grids is None:
            return torch.arange(len(ids)).expand(3, -1)
        positions, _ = self.inner.get_rope_index(
            input_ids=ids[None],
            mm_token_type_ids=is_image.int()[None],
            image_grid_thw=grids,
            attention_mask=torch.ones_like(ids)[None],
        )
        return positions[:, 0]


@contextmanager
def _named(example: Example) -> Iterator[None]:
    """Turn whatever a model's processor raises into a UserError that names the example."""
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:  # templates, tokenizers and image processors fail in many ways
        raise UserError(
            f"the prompt of {example.name} cannot be encoded ({first_line(error)}): repair or "
            "remove it."
        ) from error
