"""The kernels of layers against fp64, with errors bounded by those of transformers' modules."""

import pytest
import torch

from mr1_fast.kernels.layers import gate_triton, norm_triton, operations, operators, rotary_triton

from ..data.layers import (
    DTYPES,
    EPS,
    HEADS,
    NORMED_HEADS,
    cancelling,
    check_case,
    draw,
    gate_case,
    gelu_case,
    norm_case,
    norm_rotary_case,
    rotary_case,
)
from ..kernels.layers.test_operators import calls, on_meta, shapes

FLAGS = [False, True]
ROWS = 7
"""Rows of a call: under the interpreter, each of three programs goes through two or three."""


@pytest.mark.parametrize("layer", FLAGS)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1, 80, 1536, 3584])
def test_norms(device, d, dtype, layer):
    for tokens, added in ((0, True), (1, False), (ROWS, True)):
        case = norm_case(tokens, d, dtype, layer, added)
        check_case(case, device, scale=cancelling(d, layer))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", [*HEADS, (2, 2, 32, False)], ids=str)
def test_rotations(device, heads, dtype):
    for tokens, biased in ((0, True), (1, False), (3, True)):
        check_case(rotary_case(tokens, *heads, dtype, biased), device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("heads", NORMED_HEADS[1:], ids=str)
def test_normed_heads(device, heads, dtype):
    for tokens in (0, 1, ROWS):
        check_case(norm_rotary_case(tokens, *heads, dtype), device)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("f", [1, 3420, 8960, 18_944])
def test_gating(device, f, dtype):
    for tokens, biased in ((0, True), (1, False), (3, True)):
        check_case(gate_case(tokens, f, dtype, biased), device)
        check_case(gelu_case(tokens, f, dtype, "tanh" if biased else "quick"), device)


@pytest.mark.parametrize("dtype", DTYPES[1:], ids=str)
def test_16_bit_outputs_have_the_roundings_of_transformers(device, dtype):
    """Without one of the roundings in between, a tenth of the numbers or more would differ.

    A few differ on GPUs, whose sums and exponentials are not those of a CPU in the last bit.
    """
    for case in (
        norm_case(ROWS, 1280, dtype, layer=False, added=True),
        rotary_case(ROWS, *HEADS[0], dtype, biased=True),
        rotary_case(ROWS, *HEADS[2], dtype, biased=True),
        gate_case(ROWS, 1100, dtype, biased=True),
        gelu_case(ROWS, 1100, dtype, "quick"),
        norm_rotary_case(ROWS, *NORMED_HEADS[0], dtype),
    ):
        ours = case.ours(*[x.to(device) for x in case.inputs])
        for mine, right in zip(ours, case.theirs(*case.inputs), strict=True):
            assert (mine.cpu() != right).float().mean() < 0.01


@pytest.mark.parametrize("layer", FLAGS)
def test_the_backward_norms_the_rows_again(device, layer):
    x, weight = (draw(*shape, dtype=torch.bfloat16).to(device) for shape in ((ROWS, 80), (80,)))
    bias = 2 * weight if layer else None
    dx, normed, partial = operations.norm_backward(x, x, x, weight, bias, EPS, True, False)
    assert torch.equal(normed, operations.norm(x, weight, bias, EPS))
    assert partial.shape == (0,)
    alone = operations.norm_backward(x, x, x, weight, bias, EPS, False, False)
    assert torch.equal(dx, alone[0]) and alone[1].shape == (0,)


def test_every_row_counts_once_in_the_sums(device):
    """Each part is written, also where there are fewer rows than programs."""
    weight = torch.ones(80, device=device)
    parts = operations.sum_parts(weight[None])
    assert parts > 2
    for rows in (0, 1, parts, 2 * parts + 1):
        x = torch.ones(rows, 80, device=device)
        _, _, partial = operations.norm_backward(x, None, x, weight, 2 * weight, 1.0, False, True)
        assert partial.shape == (parts, 2, 80)
        assert torch.equal(partial[:, 1].sum(0), torch.full_like(weight, rows))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("parts, rows, d", [(1, 1, 1), (3, 2, 80), (130, 1, 1536), (65, 2, 1280)])
def test_parts_add_up(device, parts, rows, d, dtype):
    partial = draw(parts, rows, d).to(device)
    sums = operations.norm_gradients(partial, draw(d).to(device, dtype))
    exact = partial.double().sum(0)
    rounding = torch.finfo(dtype).eps / 2 + parts * 2**-24
    assert sums.dtype == dtype
    bound = rounding * partial.double().abs().sum(0)
    assert ((sums.double() - exact).abs() <= bound).all()


def test_the_order_of_programs_does_not_matter(device, reverse_grid):
    arguments = [draw(ROWS, 80, seed=seed).to(device) for seed in range(3)]
    arguments += [draw(80).to(device), draw(80).to(device), EPS, True, True]
    q, kv, qkv, weight, angles = (
        draw(*shape).to(device)
        for shape in ((50, 9, 72), (50, 3, 72), (50, 15 * 72), (72,), (50, 72))
    )
    heads = [q, kv, kv, qkv, weight, weight, EPS, angles, angles, True]

    def both() -> tuple[torch.Tensor, ...]:
        return *operations.norm_backward(*arguments), *operations.norm_rotary_backward(*heads)

    forwards = both()
    reverse_grid()
    assert all(map(torch.equal, forwards, both()))


@pytest.mark.parametrize("name", calls())
def test_results_look_as_planned(device, name):
    """Shapes, strides and dtypes are those of the meta device, but for the parts of sums."""
    operator, arguments = calls()[name]
    real = operator(*[x.to(device) if isinstance(x, torch.Tensor) else x for x in arguments])
    planned, real = shapes(operator(*on_meta(arguments))), shapes(real)
    with_sums = operator in (operators.norm_backward, operators.norm_rotary_backward)
    if with_sums and arguments[-1]:
        planned[-1], real[-1] = planned[-1][0][1:], real[-1][0][1:]
    assert planned == real


def test_columns_that_are_not_adjacent_are_refused(device):
    x, weight = draw(4, 6).to(device).T, draw(4).to(device)
    heads = draw(6, 2, 8).to(device).transpose(1, 2)
    angles = draw(6, 2).to(device)
    for call in (
        lambda: norm_triton.add_norm(x, None, weight, None, EPS),
        lambda: norm_triton.norm_backward(x, None, x, weight, None, EPS, True, True, 3),
        lambda: rotary_triton.rotary_backward(heads, heads, heads, angles, angles),
        lambda: gate_triton.silu_mul(x, None),
        lambda: gate_triton.gelu_backward(x, x, "tanh"),
    ):
        with pytest.raises(ValueError, match="adjacent"):
            call()
