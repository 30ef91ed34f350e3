"""Decode's sweep: entries are those that launchers ask for; operations agree in all ways."""

import json

import pytest
import torch
from decode_cases import KINDS, Contents, Shape, apart, operations, spans_of
from decode_tiles import BUCKETS, OVERLAPS, tiles
from gpu_items import DECODE_FAMILIES
from sources import TABLE
from sweep_decode import Overlapped, decode_kernels, exact_linear, with_overlap

from mr1_fast.kernels import tuned
from mr1_fast.kernels.decode import linear_tiles
from mr1_fast.kernels.decode.reference import linear_ref
from mr1_fast.kernels.overlap import Overlap, decode_overlap

KERNELS = {kernel.name: kernel for kernel in decode_kernels()}


@pytest.fixture
def asked(monkeypatch):
    """The names that launchers ask the launch table for."""
    names = []

    def ask(name, device, default):
        names.append(name)
        return default

    monkeypatch.setattr(linear_tiles, "tuned", ask)
    return names


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("rows", [1, 32, 33, 64, 128, 200])
def test_launchers_ask_for_the_entries_that_are_written(kind, rows, asked):
    contents = Contents(kind, "cpu")
    layer, x = contents.layer(64, 64), contents.normal(rows, 64)
    for operation, layers in (("linears", [layer]), ("swiglu", [layer] * 2), ("parts", [layer])):
        tile = linear_tiles.choose_tile(operation, x, layers)
        kernel = KERNELS[asked[-1]]
        assert kernel.family == f"decode_{operation}{kind}"
        assert all(type(variant) is type(tile) for variant in kernel.variants())


def test_names_are_different_and_each_has_settings_and_sizes():
    kernels = decode_kernels()
    assert len(KERNELS) == len(kernels) == 2 + 3 * len(KINDS) * len(BUCKETS)
    for kernel in kernels:
        assert kernel.variants() and kernel.sizes() and kernel.checked_sizes()
    assert {kernel.benchmark for kernel in kernels[:-1]} == {"sweep_decode"}
    assert {kernel.family for kernel in kernels[:-1]} == set(DECODE_FAMILIES)
    assert isinstance(kernels[-1], Overlapped)  # timed with what the others have written


def test_tiles_have_no_more_rows_than_there_are():
    for operation in ("linears", "swiglu", "parts"):
        for bucket in BUCKETS:
            assert all(bucket // 4 <= tile.rows <= bucket for tile in tiles(operation, bucket))


def test_a_setting_of_overlap_is_that_of_the_launch_table_for_a_while(monkeypatch):
    device = torch.device("cuda", 0)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(tuned, "architecture", lambda device: "sm_90")
    before = json.loads(TABLE.read_text()).get("sm_90", {})
    for setting in OVERLAPS:
        with with_overlap(setting):
            assert decode_overlap(device) == setting
            kept = {**tuned.read_table()["sm_90"]}
            assert kept.pop("decode_overlap") == setting._asdict()
            assert kept == {k: v for k, v in before.items() if k != "decode_overlap"}
    with with_overlap(None):
        assert decode_overlap(device) == Overlap()


@pytest.mark.parametrize("kind", KINDS)
def test_the_exact_layer_is_the_reference(kind):
    contents = Contents(kind, "cpu")
    layer, x = contents.layer(24, 128, bias=True), contents.normal(3, 128)
    exact = exact_linear(x, layer)
    error = (linear_ref(x, layer) - exact).abs().max()
    assert error < 2e-2 * exact.abs().max()


@pytest.mark.parametrize("kind", KINDS)
def test_all_ways_to_compute_an_operation_agree(kind):
    shape = Shape(d=128, f=192, q=128, kv=64, layers=2, v=300, head=32)
    found = {}
    for make in operations(shape, 9, kind, "cpu"):
        operation = make()
        found[operation.name] = operation
        outputs = [joined(calls[0]()) for calls in operation.ways.values()]
        if operation.name != "attend":  # whose rows are in another order
            for other in outputs[1:]:
                assert (other - outputs[0]).norm() < 0.02 * outputs[0].norm()
    assert [each.times for each in found.values()] == [2] * 7 + [1] * 3
    bits = 4.15 if "_four_bit" in kind else 16
    weights = found["down_proj"].cost - 2 * 9 * (128 + 192)
    adapters = 4 * 16 * (128 + 192) if "_lora" in kind else 0
    assert weights - adapters == pytest.approx(128 * 192 * bits / 8, rel=0.01)


def joined(outputs) -> torch.Tensor:
    outputs = outputs if isinstance(outputs, (tuple, list)) else [outputs]
    return torch.cat([each.float().flatten() for each in outputs])


@pytest.mark.parametrize("rows", [1, 8, 20, 64])
def test_rows_apart_are_all_rows_and_share_no_prefix_with_a_neighbour(rows):
    spans = spans_of(rows, "cpu")
    order = apart(rows)
    assert sorted(order.tolist()) == list(range(rows))
    own = spans[:, 2]
    assert (own.diff() == spans[0, 3]).all()  # own tokens lie side by side
    if rows > 8:
        starts = spans[order, 0]
        assert (starts[1:] != starts[:-1]).all()
