"""The vision tower in two calls is the tower in one, and keeps no tensor alive."""

import gc
from functools import partial

import pytest
import torch

from mr1_fast.model.forward import LayerRun, _run_vision_blocks
from mr1_fast.model.vision import begin_patches, encode_patches, merge_patches
from mr1_fast.packing import pack

from ..data.models import VISION_FAMILIES, mixed_examples, tiny_policy

RUN = partial(_run_vision_blocks, LayerRun())
OWN_BLOCKS = partial(_run_vision_blocks, LayerRun(fused=False))


def tower_and_images(family: str):
    policy = tiny_policy(torch.bfloat16, family)
    examples = mixed_examples()[1:]
    completions = [torch.tensor([5])] * len(examples)
    batch = pack([policy.encode(e) for e in examples], completions, list(range(len(examples))))
    return policy.model.model.visual, batch.pixel_values, batch.image_grid_thw


@pytest.mark.parametrize("family", VISION_FAMILIES)
@torch.no_grad()
def test_features_are_those_of_the_towers_own_forward(family):
    visual, pixels, grid = tower_and_images(family)
    expected = visual(pixels, grid_thw=grid)
    deepstack = getattr(expected, "deepstack_features", [])
    assert len(deepstack) == (2 if family == "qwen3_vl" else 0)
    found = encode_patches(visual, pixels, grid, OWN_BLOCKS)
    assert torch.equal(found.tokens, expected.pooler_output)
    assert len(found.deepstack) == len(deepstack)
    assert all(torch.equal(a, b) for a, b in zip(found.deepstack, deepstack, strict=True))


@pytest.mark.parametrize("family", VISION_FAMILIES)
@torch.no_grad()
def test_two_calls_equal_one(family):
    visual, pixels, grid = tower_and_images(family)
    expected = encode_patches(visual, pixels, grid, RUN)
    patches, calls = begin_patches(visual, pixels, grid)
    assert patches.shape == (len(pixels), 64)
    assert [call.block for call in calls] == list(visual.blocks)
    hidden, deepstack = RUN(patches, calls)
    assert torch.equal(merge_patches(visual, hidden, grid), expected.tokens)
    assert all(torch.equal(a, b) for a, b in zip(deepstack, expected.deepstack, strict=True))
    assert len(expected.tokens) * 4 == len(pixels)


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen2_5_vl", "qwen3_vl"])
def test_nothing_waits_for_the_garbage_collector(family):
    visual, pixels, grid = tower_and_images(family)

    def tensors() -> int:
        return sum(issubclass(type(x), torch.Tensor) for x in gc.get_objects())

    def run() -> None:
        encode_patches(visual, pixels, grid, RUN)
        patches, calls = begin_patches(visual, pixels, grid)
        merge_patches(visual, RUN(patches, calls)[0], grid)

    run()  # transformers and torch make what they keep
    gc.collect()
    gc.disable()
    try:
        before = tensors()
        run()
        assert tensors() == before
    finally:
        gc.enable()
