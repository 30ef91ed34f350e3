"""The native norm and gating against PyTorch's bits and fp64, on every instruction set."""

import math

import pytest
import torch
from torch.nn.functional import rms_norm

from mr1_fast.kernels.layers import layers_native, operations, reference

from ...data.layers import EPS, draw
from ...data.loss import assert_within_bound
from ...data.native import DTYPES, INSTRUCTION_SETS, Guards, threads, using

ROWS = [0, 1, 5]
WIDTHS = [8, 9, 31, 33, 80, 128, 513, 1280, 1536, 3584, 20_000]


@pytest.fixture(params=INSTRUCTION_SETS, autouse=True)
def instruction_set(request):
    with using(request.param):
        yield request.param


def norm_inputs(rows: int, d: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    """Draw rows, an update and a weight."""
    x, update = 3 * draw(rows, d, dtype=dtype), draw(rows, d, dtype=dtype, seed=1)
    return x, update, 1 + draw(d, dtype=dtype, seed=2) / 4


def same_bits(a: torch.Tensor, b: torch.Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_norms_have_the_bits_of_the_reference(dtype):
    for d in WIDTHS:
        for rows in ROWS:
            x, update, weight = norm_inputs(rows, d, dtype)
            expected = reference.norm_ref(x, weight, None, EPS)
            assert same_bits(layers_native.norm(x, weight, EPS), expected), (d, rows)
            ours = layers_native.add_norm(x, update, weight, EPS)
            theirs = reference.add_norm_ref(x, update, weight, None, EPS)
            assert all(map(same_bits, ours, theirs)), (d, rows)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("d", [1, 2, 3, 7])
def test_norms_of_few_columns(d, dtype):
    x, _, weight = norm_inputs(9, d, dtype)
    exact = rms_norm(x.double(), (d,), weight.double(), EPS)
    eager = reference.norm_ref(x, weight, None, EPS)
    assert_within_bound(layers_native.norm(x, weight, EPS), eager, exact, "norm")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_strided_rows_give_the_same_and_nothing_else_is_written(dtype, monkeypatch):
    wide, wide_update = draw(2, 7, 230, dtype=dtype).unbind()
    weight, bias = draw(85, dtype=dtype, seed=1), draw(170, dtype=dtype, seed=2)

    def strided(x: torch.Tensor, d: int) -> list[torch.Tensor]:
        some = x[::2, 5 : 5 + d]
        return [some, some.contiguous(), some.T.contiguous().T]

    rows, updates = strided(wide, 85), strided(wide_update, 85)
    before = wide.clone()
    guards = Guards(monkeypatch)
    calls = [
        [layers_native.norm(x, weight, EPS) for x in rows],
        [layers_native.add_norm(x, u, weight, EPS)[0] for x, u in zip(rows, updates, strict=True)],
        [layers_native.add_norm(x, u, weight, EPS)[1] for x, u in zip(rows, updates, strict=True)],
        [layers_native.silu_mul(x, None) for x in strided(wide, 170)],
        [layers_native.silu_mul(x, bias) for x in strided(wide, 170)],
    ]
    apart = torch.stack([weight, -weight], dim=1)[:, 0]
    calls[0].append(layers_native.norm(rows[0], apart, EPS))
    for first, *others in calls:
        assert first.is_contiguous() and all(same_bits(first, other) for other in others)
    guards.assert_untouched()
    assert torch.equal(wide, before)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_threads_change_nothing(dtype):
    x, update, weight = norm_inputs(261, 513, dtype)  # work enough for a team
    results = []
    for count in (1, 2):
        with threads(count):
            results.append(
                (
                    layers_native.norm(x, weight, EPS),
                    *layers_native.add_norm(x, update, weight, EPS),
                    layers_native.silu_mul(torch.cat([x, update], dim=1), None),
                )
            )
    assert all(map(same_bits, *results))


def test_nan_stays_in_its_row():
    x, _, weight = norm_inputs(5, 80, torch.float32)
    clean = layers_native.norm(x, weight, EPS)
    x[1, 79] = math.nan
    normed = layers_native.norm(x, weight, EPS)
    assert normed[1].isnan().all()
    normed[1] = clean[1]
    assert torch.equal(normed, clean)


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("f", [1, 7, 16, 33, 768, 3421])
def test_gating_agrees_with_fp64(f, dtype):
    for rows in ROWS:
        gate_up, bias = 4 * draw(rows, 2 * f, dtype=dtype), draw(2 * f, dtype=dtype, seed=1)
        for added in (None, bias):
            wide = None if added is None else added.double()
            exact = reference.silu_mul_ref(gate_up.double(), wide)
            eager = reference.silu_mul_ref(gate_up, added)
            ours = layers_native.silu_mul(gate_up, added)
            assert ours.dtype == dtype and ours.is_contiguous()
            assert_within_bound(ours, eager, exact, f"{rows} rows")


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_backward_gives_the_output_of_the_forward_once_more(dtype):
    gate_up, bias = 4 * draw(5, 66, dtype=dtype), draw(66, dtype=dtype, seed=1)
    for added in (None, bias):
        _, out = operations.silu_mul_backward(draw(5, 33, dtype=dtype), gate_up, added)
        assert same_bits(out, operations.silu_mul(gate_up, added))


def test_gates_of_any_size():
    gate = torch.tensor([-3e38, -200.0, -90.0, -20.0, -0.0, 0.0, 1e-30, 20.0, 200.0, 3e38])
    ours = layers_native.silu_mul(torch.cat([gate, torch.ones(10)])[None], None)
    exact = reference.silu_mul_ref(torch.cat([gate, torch.ones(10)])[None].double(), None)
    torch.testing.assert_close(ours.double(), exact, rtol=2e-6, atol=1e-30)
    gate = torch.tensor([math.inf, math.nan, -math.inf])
    ours = layers_native.silu_mul(torch.cat([gate, torch.ones(3)])[None], None)[0]
    assert ours[0] == math.inf and ours[1:].isnan().all()


def test_the_operations_choose_it(monkeypatch):
    x, update, weight = norm_inputs(3, 16, torch.float32)
    for name in ("norm", "add_norm", "silu_mul"):
        monkeypatch.setattr(layers_native, name, lambda *arguments: "native")
    for dtype in (*DTYPES, torch.float64):
        rows, delta, scale = (each.to(dtype) for each in (x, update, weight))
        found = [
            operations.norm(rows, scale, None, EPS),
            operations.add_norm(rows, delta, scale, None, EPS),
            operations.silu_mul(rows, None),
        ]
        assert [each == "native" for each in map(str, found)] == [dtype in DTYPES] * 3
        assert torch.is_tensor(operations.norm(rows, scale, scale, EPS))
        assert torch.is_tensor(operations.add_norm(rows, delta, scale, scale, EPS)[1])
    monkeypatch.setattr(layers_native, "takes", lambda *arguments: False)
    assert torch.is_tensor(operations.norm(x, weight, None, EPS))


def test_what_it_takes_and_what_it_refuses():
    x, update, weight = norm_inputs(3, 16, torch.float32)
    assert layers_native.takes(x, weight) and layers_native.takes(x, None)
    assert not layers_native.takes(x, weight.half())
    assert not layers_native.takes(x.to("meta"), None)
    with pytest.raises(ValueError, match="weight"):
        layers_native.norm(x, weight[:8], EPS)
    with pytest.raises(ValueError, match="update"):
        layers_native.add_norm(x, update[:2], weight, EPS)
    with pytest.raises(ValueError, match="bias"):
        layers_native.silu_mul(x, weight[:8])
    with pytest.raises(ValueError, match="gate_up"):
        layers_native.silu_mul(x[:, :15], None)
