"""Sizes of images: the image processor's own limit, and what --shrink-images makes of others."""

import numpy as np
import pytest
from PIL import Image
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

from mr1_fast.errors import UserError
from mr1_fast.model.image_size import ImageSizes

PROCESSORS = {
    "tiny's": Qwen2VLImageProcessorPil(min_pixels=28 * 28, max_pixels=401_408),
    "Qwen2-VL's": Qwen2VLImageProcessorPil(),
    "Qwen3-VL's": Qwen2VLImageProcessorPil(
        size={"shortest_edge": 65_536, "longest_edge": 16_777_216}, patch_size=16
    ),
    "a narrow one": Qwen2VLImageProcessorPil(min_pixels=112 * 112, max_pixels=140 * 140),
}
SIZES = [
    *((1, 1), (5, 3), (9, 100), (9, 1800), (13, 27), (28, 28), (84, 84), (140, 56), (33, 1000)),
    *((640, 480), (1001, 399), (2800, 14), (3000, 2000), (200, 1), (1, 200)),
]
THIN = [(2048, 9), (9, 2048), (60_000, 20), (20, 60_000), (201, 1), (40_000, 199), (14_336, 28)]


@pytest.mark.parametrize("processor", PROCESSORS.values(), ids=PROCESSORS)
@pytest.mark.parametrize("size", SIZES + THIN + [(40_000, 200), (60_000, 300)])
@pytest.mark.parametrize("max_pixels", [3136, 10_000, 401_408])
def test_a_fitted_image_is_taken_and_has_the_tokens_that_its_size_says(processor, size, max_pixels):
    sizes = ImageSizes(processor, max_pixels, shrink=True)
    sizes.check(size, "row 1")
    image = sizes.fit(Image.new("RGB", size, "red"))
    assert image.size == sizes.fitted(size)
    assert image.width * image.height <= max_pixels
    grid = processor(images=[image], return_tensors="pt")["image_grid_thw"]
    assert sizes.num_tokens(size) == int(grid.prod()) // 4 > 0


@pytest.mark.parametrize("size", SIZES)
def test_what_is_neither_large_nor_thin_stays_as_it_is(size):
    image = Image.new("RGB", size)
    assert ImageSizes(PROCESSORS["tiny's"], 6_000_000, shrink=True).fit(image) is image
    ImageSizes(PROCESSORS["tiny's"], 6_000_000, shrink=False).check(size, "row 1")


@pytest.mark.parametrize("size", THIN)
def test_a_thin_image_is_refused_without_the_flag_by_the_processors_own_limit(size):
    with pytest.raises(ValueError, match="aspect ratio"):
        PROCESSORS["tiny's"](images=[Image.new("RGB", size)])
    with pytest.raises(UserError) as caught:
        ImageSizes(PROCESSORS["tiny's"], 10**9, shrink=False).check(size, "row 38 of train.jsonl")
    message = str(caught.value)
    assert message.startswith(f"an image of row 38 of train.jsonl has {size[0]}×{size[1]} pixels")
    assert "more than 200 times as long as wide: pass --shrink-images true" in message


def test_the_limit_is_looked_up_in_the_image_processor():
    class Patient(Qwen2VLImageProcessorPil):
        def get_number_of_image_patches(self, height, width, images_kwargs=None):
            if max(height, width) / min(height, width) > 37.5:
                raise ValueError("too thin")
            return 4

    sizes = ImageSizes(Patient(), 401_408, shrink=True)
    assert sizes.stretch == 37
    assert sizes.fitted((2800, 40)) == (2800, 84)


def test_a_thin_image_is_padded_with_white_in_its_own_resolution():
    pixels = np.random.default_rng(0).integers(0, 200, (9, 2048, 3), dtype=np.uint8)
    padded = ImageSizes(PROCESSORS["tiny's"], 401_408, True).fit(Image.fromarray(pixels))
    assert padded.size == (2048, 28)
    seen = np.asarray(padded)
    assert (seen[9:18] == pixels).all()
    assert (seen[:9] == 255).all() and (seen[18:] == 255).all()


def test_a_token_of_qwen3_vl_is_32_pixels_wide():
    sizes = ImageSizes(PROCESSORS["Qwen3-VL's"], 200_000, True)
    assert sizes.side == 32 and sizes.num_tokens((320, 608)) == 10 * 19
    assert sizes.num_tokens((32, 32)) == 64, "a small image is enlarged to 65,536 pixels"
    assert sizes.fitted((2048, 9)) == (2048, 32)
    width, height = sizes.fitted((3000, 2000))
    assert width % 32 == height % 32 == 0 and 150_000 < width * height <= 200_000


@pytest.mark.parametrize("size", [(60_000, 300), (300, 60_000), (3000, 2000), (401, 1999)])
def test_scaling_down_keeps_the_aspect_ratio_to_within_a_token(size):
    sizes = ImageSizes(PROCESSORS["tiny's"], 401_408, True)
    width, height = sizes.fitted(size)
    assert width % 28 == height % 28 == 0
    # The side that the other one asks for is less than one token off, times the stretch.
    stretch = max(size) / min(size)
    assert abs(max(width, height) - stretch * min(width, height)) <= 28 * stretch


def test_an_image_of_a_hundred_million_pixels_in_one_row_is_made_small_at_once():
    sizes = ImageSizes(PROCESSORS["tiny's"], 401_408, True)
    assert sizes.fit(Image.new("L", (100_000_000, 1))).size == sizes.fitted((100_000_000, 1))


def test_an_image_without_pixels_is_named():
    with pytest.raises(UserError, match="an image of row 3 has 0×5 pixels"):
        ImageSizes(PROCESSORS["tiny's"], 401_408, True).check((0, 5), "row 3")
