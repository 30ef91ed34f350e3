"""The reference of layers against transformers' own modules, and against fp64."""

import pytest
import torch

from mr1_fast.kernels.layers import layers_native, operations

from ...data.layers import (
    HEADS,
    MLP_WIDTHS,
    NORMED_HEADS,
    TOKENS,
    WIDTHS,
    cancelling,
    check_case,
    gate_case,
    gelu_case,
    norm_case,
    norm_rotary_case,
    rotary_case,
    run,
)

DTYPES = [torch.float32, torch.bfloat16]
FLAGS = [False, True]


def assert_same_forward(case, outputs: int) -> None:
    """Assert that the outputs are those of transformers bit for bit."""
    ours, theirs = (run(each, case.inputs)[:outputs] for each in (case.ours, case.theirs))
    for mine, right in zip(ours, theirs, strict=True):
        assert mine.dtype == right.dtype and torch.equal(mine, right)


@pytest.mark.parametrize("added", FLAGS)
@pytest.mark.parametrize("layer", FLAGS)
@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("d", WIDTHS)
def test_norms_are_those_of_transformers_bit_for_bit(d, dtype, layer, added):
    for tokens in TOKENS:
        assert_same_forward(norm_case(tokens, d, dtype, layer, added), 1 + added)


@pytest.mark.parametrize("biased", FLAGS)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_rotations_are_those_of_transformers_bit_for_bit(heads, biased):
    for tokens in TOKENS:
        for dtype in (torch.bfloat16, torch.float16):
            assert_same_forward(rotary_case(tokens, *heads, dtype, biased), 3)


@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_rotations_in_fp32_skip_a_rounding(heads):
    case = rotary_case(7, *heads, torch.float32, True)
    ours, theirs = (run(each, case.inputs)[:3] for each in (case.ours, case.theirs))
    for mine, right in zip(ours, theirs, strict=True):
        torch.testing.assert_close(mine, right, rtol=1e-6, atol=1e-6)
    assert torch.equal(ours[2], theirs[2])


def test_an_fp64_model_rotates_patches_in_fp32():
    assert_same_forward(rotary_case(7, *HEADS[2], torch.float64, True), 3)


@pytest.mark.parametrize("heads", NORMED_HEADS, ids=str)
def test_normed_heads_are_those_of_transformers(heads):
    """In 16 bits bit for bit; in fp32 and fp64 the rotation skips a rounding."""
    for tokens in TOKENS:
        assert_same_forward(norm_rotary_case(tokens, *heads, torch.bfloat16), 3)
        for dtype in (torch.float32, torch.float64):
            case = norm_rotary_case(tokens, *heads, dtype)
            ours, theirs = (run(each, case.inputs)[:3] for each in (case.ours, case.theirs))
            epsilon = 4 * torch.finfo(dtype).eps
            for mine, right in zip(ours, theirs, strict=True):
                torch.testing.assert_close(mine, right, rtol=epsilon, atol=4 * epsilon)


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float64])
@pytest.mark.parametrize("f", MLP_WIDTHS)
def test_gating_is_that_of_transformers_bit_for_bit(f, dtype, monkeypatch):
    # The native kernel's exponential rounds differently
    monkeypatch.setattr(layers_native, "takes", lambda *arguments: False)
    for tokens in TOKENS:
        for biased in FLAGS:
            assert_same_forward(gate_case(tokens, f, dtype, biased), 1)
        for kind in operations.GELUS:
            assert_same_forward(gelu_case(tokens, f, dtype, kind), 1)


def test_another_kind_of_gelu_is_refused():
    x = torch.ones(1, 8)
    for call in (
        lambda: operations.gelu(x, "exact"),
        lambda: operations.gelu_backward(x, x, "exact"),
    ):
        with pytest.raises(ValueError, match="kind is 'exact', but must be one of quick, tanh"):
            call()


@pytest.mark.parametrize("layer", FLAGS)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("d", WIDTHS)
def test_norms_and_their_gradients(d, dtype, layer):
    for tokens in (*TOKENS, 64):
        for added in FLAGS:
            check_case(norm_case(tokens, d, dtype, layer, added), scale=cancelling(d, layer))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", HEADS, ids=str)
def test_rotations_and_their_gradients(heads, dtype):
    for tokens in TOKENS:
        for biased in FLAGS:
            check_case(rotary_case(tokens, *heads, dtype, biased))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("heads", NORMED_HEADS, ids=str)
def test_normed_heads_and_their_gradients(heads, dtype):
    for tokens in TOKENS:
        check_case(norm_rotary_case(tokens, *heads, dtype))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("f", MLP_WIDTHS)
def test_gating_and_its_gradients(f, dtype):
    for tokens in TOKENS:
        for biased in FLAGS:
            check_case(gate_case(tokens, f, dtype, biased))
        for kind in operations.GELUS:
            check_case(gelu_case(tokens, f, dtype, kind))
