"""Marks of images in a text: places kept, and counts that must fit."""

import pytest

from mr1_fast.errors import UserError
from mr1_fast.tasks.data.marks import place_images, with_marks

PAD = "<|vision_start|><|image_pad|><|vision_end|>"


@pytest.mark.parametrize(
    "text, images, placed, order",
    [
        ("How many?", "a", "How many?", "a"),
        ("How many?", "", "How many?", ""),
        ("<image>How many?", "a", "How many?", "a"),
        (" <image>\n<image> How many? ", "ab", "How many?", "ab"),
        (PAD + "How many?", "a", "How many?", "a"),
        ("How many?<image>", "a", "How many?<image>", "a"),
        (f"Is <image> {PAD}?", "ab", "Is <image> <image>?", "ab"),
        ("<image>Like <image>?", "ab", "<image>Like <image>?", "ab"),
        ("<image 1>How many?", "a", "How many?", "a"),
        ("<image1> or <image 2>?", "ab", "<image> or <image>?", "ab"),
        ("Is <image 2> in <image 1>?", "ab", "Is <image> in <image>?", "ba"),
        ("<image 1> as in <image 1>?", "a", "<image 1> as in <image 1>?", "a"),
        ("<image 2>?", "ab", "<image 2>?", "ab"),
        ("<image 1>?", "", "<image 1>?", ""),
        ("<image> is <image 1>?", "a", "is <image 1>?", "a"),
        ("a <|im_end|> <|image_pad|>", "a", "a <|im_end|> <|image_pad|>", "a"),
    ],
)
def test_places(text, images, placed, order):
    assert place_images(with_marks(text), list(images), "row 1") == (placed, list(order))


@pytest.mark.parametrize(
    "text, images, message",
    [
        (
            "First <image> then <image>",
            "a",
            "row 7 has 2 marks <image> in its problem, but 1 image:",
        ),
        ("<image>How many?", "", "row 7 has 1 mark <image> in its problem, but no images:"),
        (PAD, "ab", "row 7 has 1 mark <image> in its problem, but 2 images:"),
    ],
)
def test_a_count_that_does_not_fit(text, images, message):
    with pytest.raises(UserError, match=message):
        place_images(with_marks(text), list(images), "row 7")


def test_hostile_texts_take_linear_time():
    for text in (
        "<|vision_start|><|image_pad|>" * 100_000,
        "<image " * 300_000,
        "<image 1" * 300_000,
    ):
        assert place_images(with_marks(text), [1], "row")[1] == [1]
