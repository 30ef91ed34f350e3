"""The decode step's benchmark, with times that are made up: sums, limits and tables."""

from functools import partial

import bench_decode_step
import pytest
from bench_decode_step import WHOLE, measured, print_layers, print_measured
from decode_cases import KINDS, Shape, operations
from decode_tiles import OVERLAPS

SHAPE = Shape(d=128, f=192, q=128, kv=64, layers=5, v=300, head=32)


@pytest.fixture
def lines(monkeypatch):
    """The lines of a small model, each operation taking 2 µs."""
    monkeypatch.setitem(bench_decode_step.MODELS, "2B", SHAPE)
    monkeypatch.setattr(bench_decode_step, "operations", partial(operations, device="cpu"))
    monkeypatch.setattr(bench_decode_step, "microseconds", lambda calls: 2.0)
    return [each for kind in KINDS for each in measured("2B", 9, kind, bandwidth=1000.0)]


def test_a_step_is_the_sum_of_its_operations_in_our_way(lines, capsys):
    for kind in KINDS:
        of_kind = {each["operation"]: each for each in lines if each["kind"] == kind}
        whole = of_kind[WHOLE]
        assert whole["microseconds"] == 2.0 * (7 * 5 + 3)
        cost = 1e6 * sum(
            each["megabytes"] * (1 if name in ("add_rms_norm", "head", "sample") else 5)
            for name, each in of_kind.items()
            if ":" not in name and name != WHOLE
        )
        assert 1e6 * whole["megabytes"] == pytest.approx(cost)
        assert whole["of_read"] == pytest.approx(cost / 1000 / whole["microseconds"])
        after = sum(of_kind[name]["megabytes"] for name in ("add_rms_norm", "head", "sample"))
        assert 5 * whole["layer_cost"] == pytest.approx(cost - 1e6 * after)

    print_measured(lines, [9])
    printed = capsys.readouterr().out
    assert "| 2B | nf4 with LoRA | 9 | 0.076 | 1.00 |" in printed
    assert "bitsandbytes, F.linear, adapters as peft" in printed


def test_layers_have_a_line_for_each_setting_of_overlap(capsys):
    case = {"model": "2B", "kind": "_lora", "microseconds": 40.0, "of_read": 0.5}
    settings = [None, *(setting._asdict() for setting in OVERLAPS)]
    print_layers([case | {"setting": setting} for setting in settings], 8)
    printed = capsys.readouterr().out.splitlines()
    assert "| 2B | plain with LoRA | one by one | 0 | 40.0 | 50% |" in printed
    assert "| 2B | plain with LoRA | dependent | 16384 | 40.0 | 50% |" in printed
