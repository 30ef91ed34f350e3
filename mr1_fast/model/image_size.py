"""Which sizes of images a model takes, how many tokens they become, and how others are made to fit.

All of it is computed from width and height: no pixel is read before an image is made to fit.
"""

from bisect import bisect_left
from functools import cached_property

from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from ..errors import UserError

MOST_STRETCHED = 2**20
"""Aspect ratio up to which the limit of an image processor is looked for."""


class ImageSizes:
    """The sizes that an image processor and the user's settings allow.

    max_pixels: the most pixels of an image, as width × height.
    shrink: whether larger images are scaled down, and too thin ones padded, instead of refused.
    """

    def __init__(self, processor: Qwen2VLImageProcessorPil, max_pixels: int, shrink: bool):
        self.processor, self.max_pixels, self.shrink = processor, max_pixels, shrink
        self.side = processor.patch_size * processor.merge_size
        """Pixels along each side of an image token."""

    def check(self, size: tuple[int, int], name: str) -> None:
        """Raise UserError for an image (width, height) that is refused; `name` says whose it is."""
        width, height = size
        if min(size) < 1:
            raise UserError(f"an image of {name} has {width}×{height} pixels: replace it.")
        if self.shrink:
            return
        if not self._is_taken(size):
            raise UserError(
                f"an image of {name} has {width}×{height} pixels, but the model takes none that is "
                f"more than {self.stretch} times as long as wide: pass --shrink-images true, which "
                "pads it, or replace it."
            )
        if width * height > self.max_pixels:
            raise UserError(
                f"an image of {name} has {width}×{height} pixels, more than max_pixels = "
                f"{self.max_pixels}: raise --max-pixels, or pass --shrink-images true."
            )

    def fitted(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the (width, height) that an image gets before the image processor sees it.

        It is its own unless it is too large or too thin. A large one is scaled down, near its
        aspect ratio, to whole image tokens.
        """
        if not self._is_taken(size):
            size = self._padded(size)
        width, height = size
        if width * height <= self.max_pixels:
            return size
        scale = (self.max_pixels / (width * height)) ** 0.5
        width, height = (max(self.side, self._floor(side * scale)) for side in size)
        # A side that has been raised to one token, or rounded, leaves less to the other one.
        longest = min(self.stretch * min(width, height), self.max_pixels // min(width, height))
        longest = max(self.side, self._floor(longest))
        return min(width, longest), min(height, longest)

    def num_tokens(self, size: tuple[int, int]) -> int:
        """Return how many tokens an image (width, height) becomes."""
        patches = self._patches(self.fitted(size))
        return patches // self.processor.merge_size**2

    def fit(self, image: Image.Image) -> Image.Image:
        """Return the image in its fitted size; where that is wider or higher, on white."""
        size = self.fitted(image.size)
        if size == image.size:
            return image
        if self._is_taken(image.size):
            return image.resize(size, Image.Resampling.BICUBIC)
        scale = min(1, *(new / old for new, old in zip(size, image.size, strict=True)))
        width, height = (max(1, round(side * scale)) for side in image.size)
        canvas = Image.new("RGB", size, "white")
        place = (size[0] - width) // 2, (size[1] - height) // 2
        # Pillow cannot scale a row of 100 million pixels in one go; it first averages some.
        content = image.resize((width, height), Image.Resampling.BICUBIC, reducing_gap=3)
        canvas.paste(content, place)
        return canvas

    @cached_property
    def stretch(self) -> int:
        """The largest whole aspect ratio that the image processor takes."""
        ratios = range(1, MOST_STRETCHED)
        return bisect_left(ratios, True, key=lambda ratio: not self._is_taken((ratio, 1)))

    def _padded(self, size: tuple[int, int]) -> tuple[int, int]:
        """Return the size with the shorter side raised to whole tokens and an aspect allowed."""
        least = -(-max(size) // self.stretch)
        least = -(-least // self.side) * self.side
        return max(size[0], least), max(size[1], least)

    def _is_taken(self, size: tuple[int, int]) -> bool:
        """Return whether the image processor takes an image of this size."""
        try:
            self._patches(size)
        except ValueError:
            return False
        return True

    def _patches(self, size: tuple[int, int]) -> int:
        """Return the image processor's count of patches; raises ValueError where it refuses."""
        width, height = size
        return self.processor.get_number_of_image_patches(height, width, {})

    def _floor(self, pixels: float) -> int:
        """Return the largest whole number of tokens along a side, in pixels."""
        return int(pixels) // self.side * self.side
