"""The places of images in a text: the mark `<image>`, and other ways in which data writes it."""

import re
from typing import Any

from ...errors import UserError
from ..prompts import IMAGE_MARK

_QWEN = re.compile(r"<\|vision_start\|>(?:<\|image_pad\|>)+<\|vision_end\|>")
_NUMBERED = re.compile(r"<image ?(\d{1,3})>")


def with_marks(text: str) -> str:
    """Return a text in which Qwen's tokens for an image are the mark `<image>`."""
    return _QWEN.sub(IMAGE_MARK, text)


def place_images(text: str, images: list[Any], name: str) -> tuple[str, list[Any]]:
    """Return the text with one mark for each image where it has a place, and the images in order.

    A text whose marks all come first needs none, for that is where images are shown. `<image 1>`
    and so on are marks if they name each image once; otherwise they are text. Raises UserError,
    which calls the row `name`, if there are more or fewer marks than images.
    """
    marks = text.count(IMAGE_MARK)
    numbers = [int(number) for number in _NUMBERED.findall(text)]
    if not marks and numbers and sorted(numbers) == list(range(1, len(images) + 1)):
        text = _NUMBERED.sub(IMAGE_MARK, text)
        images = [images[number - 1] for number in numbers]
        marks = len(numbers)
    if marks not in (0, len(images)):
        raise UserError(
            f"{name} has {marks} mark{'s' * (marks > 1)} {IMAGE_MARK} in its problem, but "
            f"{len(images) or 'no'} image{'s' * (len(images) != 1)}: give as many images as marks, "
            "or leave the marks out to show all images first."
        )

    words = text.split(IMAGE_MARK)
    if not "".join(words[:-1]).strip():
        text = words[-1]
    return text.strip(), images
