"""What the public operations of layers do beyond the values of their gradients."""

import pytest
import torch
from transformers.models.qwen2_vl.modeling_qwen2_vl import (
    apply_rotary_pos_emb,
    apply_rotary_pos_emb_vision,
)

from mr1_fast.kernels.layers import operations

from ...data.layers import EPS, draw

FLAGS = [False, True]


@pytest.mark.parametrize("layer", FLAGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_backward_norms_the_rows_again(dtype, layer):
    x, weight = draw(7, 80, dtype=dtype), draw(80, dtype=dtype, seed=1)
    bias = draw(80, dtype=dtype, seed=2) if layer else None
    _, normed, _ = operations.norm_backward(x, None, x, weight, bias, EPS, True, False)
    assert torch.equal(normed, operations.norm(x, weight, bias, EPS))


@pytest.mark.parametrize("layer", FLAGS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_the_residuals_gradient_is_added_before_the_rounding(dtype, layer):
    dnormed, dresidual, x = (draw(7, 80, dtype=dtype, seed=seed) for seed in range(3))
    weight = draw(80, dtype=dtype, seed=3)
    bias = draw(80, dtype=dtype, seed=4) if layer else None
    dx, _, with_sums = operations.norm_backward(
        dnormed, dresidual, x, weight, bias, EPS, False, True
    )
    wide = [t if t is None else t.double() for t in (dnormed, None, x, weight, bias)]
    alone, _, sums = operations.norm_backward(*wide, EPS, False, True)
    exact = alone + dresidual.double()
    tolerance = dict(rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(dx, exact.to(dtype), **tolerance)
    assert dtype != torch.bfloat16 or not torch.equal(dx, alone.to(dtype) + dresidual)
    assert with_sums.shape == sums.shape == (1, 1 + layer, 80)
    assert with_sums.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(with_sums.double(), sums, rtol=1e-5, atol=1e-5)


def test_what_is_not_wanted_is_empty():
    x, weight = draw(7, 80, dtype=torch.bfloat16), draw(80, dtype=torch.bfloat16)
    _, normed, partial = operations.norm_backward(x, None, x, weight, None, EPS, False, False)
    assert normed.shape == partial.shape == (0,)
    assert (normed.dtype, partial.dtype) == (torch.bfloat16, torch.float32)


def test_parts_do_not_depend_on_the_rows(monkeypatch):
    assert operations.sum_parts(draw(5, 80)) == 1
    monkeypatch.setattr(operations, "use_triton", lambda x: True)
    assert operations.sum_parts(draw(5, 80)) == operations.INTERPRETED_PARTS
    monkeypatch.setattr(operations, "_multiprocessors", lambda device: 132)

    class OnGPU:
        is_cuda, device = True, "cuda:0"

        def __init__(self, *shape: int):
            self.shape = shape

    parts = {d: operations.sum_parts(OnGPU(6144, d)) // 132 for d in (128, 1280, 1536, 3584, 16384)}
    assert parts == {128: 16, 1280: 4, 1536: 4, 3584: 2, 16384: 1}
    assert operations.sum_parts(OnGPU(0, 1536)) == 4 * 132


# --- angles -------------------------------------------------------------------------------------


def test_sections_of_mrope_are_in_the_angles(model):
    """Queries are rotated by the axis of each channel, from the definition and in transformers."""
    rotary = model.model.language_model.rotary_emb
    positions = torch.stack([torch.arange(9), torch.arange(9) // 3, torch.arange(9) % 3 + 20])
    cos, sin = (each[0] for each in rotary(draw(1, 9, 8), positions.unsqueeze(1)))
    d, heads, kv_heads = cos.shape[1], 4, 2
    qkv = draw(9, (heads + 2 * kv_heads) * d)
    q, k, v = operations.rotary(qkv, None, cos, sin, heads, kv_heads)

    sections = rotary.mrope_section
    assert sum(sections) == d // 2 and len(sections) == 3
    axis = torch.arange(3).repeat_interleave(torch.tensor(sections))
    frequency = rotary.config.rope_parameters["rope_theta"] ** (-torch.arange(0, d, 2) / d)
    turn = torch.polar(torch.ones(9, d // 2), positions[axis].T * frequency).unsqueeze(1)
    heads_of = qkv.unflatten(1, (-1, d))
    plane = torch.complex(heads_of[..., : d // 2], heads_of[..., d // 2 :])
    turned = plane[:, : heads + kv_heads] * turn
    expected = torch.cat([turned.real, turned.imag], dim=-1)
    torch.testing.assert_close(torch.cat([q, k], dim=1), expected, rtol=1e-4, atol=1e-4)

    theirs = apply_rotary_pos_emb(*heads_of[:, : heads + kv_heads].split([4, 2], 1), cos, sin)
    for ours, right in zip((q, k), theirs, strict=True):
        torch.testing.assert_close(ours, right, rtol=1e-6, atol=1e-6)
    assert torch.equal(v, heads_of[:, heads + kv_heads :])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_two_dimensions_of_patches_are_in_the_angles(model, dtype):
    """The tower's own angles, as its blocks receive them, rotate a row of patches as it does."""
    visual, grid = model.model.visual.to(dtype), torch.tensor([[1, 4, 6]])
    told = []
    handle = visual.blocks[0].register_forward_pre_hook(
        lambda block, args, kwargs: told.append(kwargs["position_embeddings"]), with_kwargs=True
    )
    visual(draw(24, 3 * 2 * 14 * 14, dtype=dtype), grid_thw=grid)
    handle.remove()
    ((cos, sin),) = told
    assert cos.dtype == torch.float32 and len(cos.unique(dim=0)) == 24
    d = cos.shape[1]
    qkv = draw(24, 3 * 4 * d, dtype=dtype)
    ours = operations.rotary(qkv, None, cos, sin, 4, 4)
    q, k, v = qkv.unflatten(1, (3, 4, d)).unbind(1)
    theirs = *apply_rotary_pos_emb_vision(q, k, cos, sin), v
    for mine, right in zip(ours, theirs, strict=True):
        if dtype == torch.bfloat16:
            assert torch.equal(mine, right)
        torch.testing.assert_close(mine, right, rtol=1e-6, atol=1e-6)
