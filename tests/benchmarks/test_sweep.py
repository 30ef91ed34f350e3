"""Sweeps: a wrong setting is named and left out, and the table gets what beats the default."""

import json
import time
from argparse import Namespace
from typing import NamedTuple

import pytest
import torch
from sources import SOURCES, Sources
from sweep import relative_times, sweep_all, time_variants, winner, write_entry
from sweep_checks import DEFAULT, Guards, Launch, Size, check, label, largest

from mr1_fast.errors import UserError


class Tile(NamedTuple):
    fault: str


RIGHT, NEAR, NAN, BEYOND, UNWRITTEN, RACE, RAISES, LARGE = tiles = [
    Tile(name) for name in ("none", "near", "nan", "beyond", "unwritten", "race", "raises", "large")
]


class Doubling:
    """A kernel that doubles its input, with the faults that a check has to find."""

    modes = ("out of place",)

    def __init__(self, name="toy", benchmark="sweep_toy"):
        self.name, self.benchmark = name, benchmark
        self.launches = 0

    def variants(self):
        return tuple(tiles)

    def others(self, device):
        return ()

    def sizes(self):
        return [Size(2, 8)]

    checked_sizes = sizes

    def inputs(self, size, dtype, device, seed):
        generator = torch.Generator().manual_seed(seed)
        return torch.randn(size.rows, size.columns, generator=generator)

    def prepare(self, x, mode):
        guards = Guards()
        out = guards.like(x)

        def call(tile):
            self.launches += 1
            fault = tile.fault if tile else "none"
            if tile is None:
                time.sleep(0.01)  # the default is slow
            if fault == "raises":
                raise RuntimeError("an illegal access\nand more")
            if fault == "large":
                raise RuntimeError("out of resource: shared memory")
            rows = slice(0, 1) if fault == "unwritten" else slice(None)
            out[rows] = 2 * x[rows]
            if fault == "near":
                out[0, 0] += 1e-3
            if fault == "nan":
                out[0, 0] = torch.nan
            if fault == "beyond":
                out.as_strided((1,), (1,), out.storage_offset() + out.numel()).zero_()
            if fault == "race" and self.launches > 30:
                out[1, 3] = 0

        def errors():
            return {"out": largest(out - 2 * x, 1e-6), "canaries": guards.broken()}

        return Launch(call, lambda: out.fill_(torch.nan), errors)


def test_only_right_settings_pass_and_the_others_are_named_with_their_reason():
    checked = check(Doubling(), [Size(2, 8)], 10, torch.float32, "cpu")
    assert checked.right == [DEFAULT, RIGHT]
    assert set(checked.wrong) == {label(t) for t in (NEAR, NAN, BEYOND, UNWRITTEN, RACE, RAISES)}
    assert "out inf of its bound" in checked.wrong[label(NAN)]
    assert "out inf of its bound" in checked.wrong[label(UNWRITTEN)]
    assert "canaries inf" in checked.wrong[label(BEYOND)]
    assert checked.wrong[label(RAISES)].endswith("2 × 8: an illegal access")
    assert set(checked.too_large) == {label(LARGE)}


def test_every_variant_is_timed_on_every_size_and_in_every_mode():
    times = time_variants(Doubling(), [DEFAULT, RIGHT], torch.float32, "cpu", seconds=0)
    assert list(times) == [DEFAULT, label(RIGHT)]
    assert all(list(cases) == ["out of place, 2 × 8"] for cases in times.values())
    assert all(case["median"] > 0 for cases in times.values() for case in cases.values())


@pytest.mark.parametrize("architecture", ["sm_90", None])
def test_a_sweep_writes_the_winner_and_tells_of_wrong_settings(
    architecture, tmp_path, monkeypatch, capsys
):
    table = tmp_path / "tuned.json"
    table.write_text("{}")
    monkeypatch.setitem(SOURCES, "sweep_toy", Sources(()))
    monkeypatch.setattr("mr1_fast.kernels.tuned.architecture", lambda device: architecture)
    given = dict(device="cpu", dtype=torch.float32, seconds=0, repeats=10, table=table)
    all_right = sweep_all([Doubling()], Namespace(**given))
    document = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert not all_right and label(NEAR) in document["wrong"]
    assert document["best"] == RIGHT._asdict()
    written = {architecture: {"toy": RIGHT._asdict()}} if architecture else {}
    assert json.loads(table.read_text()) == written


def test_kernels_of_one_benchmark_are_in_one_document(tmp_path, monkeypatch, capsys):
    table = tmp_path / "tuned.json"
    monkeypatch.setitem(SOURCES, "sweep_toys", Sources(()))
    monkeypatch.setattr("mr1_fast.kernels.tuned.architecture", lambda device: "sm_90")
    given = dict(device="cpu", dtype=torch.float32, seconds=0, repeats=1, table=table)
    kernels = [Doubling(f"toy_{rows}", "sweep_toys") for rows in (32, 64)]
    sweep_all(kernels, Namespace(**given))
    documents = [line for line in capsys.readouterr().out.splitlines() if line.startswith("{")]
    assert len(documents) == 1
    assert list(json.loads(documents[0])["kernels"]) == ["toy_32", "toy_64"]
    assert list(json.loads(table.read_text())["sm_90"]) == ["toy_32", "toy_64"]


def times_of(**variants: tuple[float, ...]) -> dict:
    """Times by variant, one case for each number."""
    return {
        name: {f"case {i}": {"median": each} for i, each in enumerate(medians)}
        for name, medians in variants.items()
    }


def test_relative_times_are_geometric_means_over_cases():
    ratios = relative_times(times_of(default=(1.0, 10.0), a=(2.0, 5.0), b=(0.5, 5.0)))
    assert ratios == pytest.approx({"default": 1.0, "a": 1.0, "b": 0.5})


@pytest.mark.parametrize(("ratio", "wins"), [(0.985, False), (0.975, True), (1.2, False)])
def test_the_fastest_wins_if_it_saves_more_than_noise(ratio, wins):
    ratios = {DEFAULT: 1.0, label(RIGHT): ratio, label(NEAR): ratio + 0.01}
    assert winner(ratios, [DEFAULT, NEAR, RIGHT]) == (RIGHT if wins else None)


def test_an_entry_is_set_and_removed_and_others_are_kept(tmp_path):
    table = tmp_path / "tuned.json"
    others = {"sm_86": {"grpo": {"fault": "x"}}, "sm_90": {"adamw": {"rows": 1}}}
    table.write_text(json.dumps(others))
    write_entry(table, "sm_90", "grpo", RIGHT)
    here = {"adamw": {"rows": 1}, "grpo": {"fault": "none"}}
    assert json.loads(table.read_text()) == {"sm_86": others["sm_86"], "sm_90": here}
    write_entry(table, "sm_90", "grpo", None)
    assert json.loads(table.read_text()) == others
    write_entry(table, "sm_90", "adamw", None)
    assert json.loads(table.read_text()) == {"sm_86": others["sm_86"]}
    assert [path.name for path in tmp_path.iterdir()] == ["tuned.json"]


def test_a_table_is_whole_or_as_it_was(tmp_path, monkeypatch):
    table = tmp_path / "tuned.json"
    table.write_text("{}")

    def fail(*arguments):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.replace", fail)
    with pytest.raises(UserError, match=r"tuned.json cannot be written .*--table"):
        write_entry(table, "sm_90", "grpo", RIGHT)
    assert table.read_text() == "{}"
