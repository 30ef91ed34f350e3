"""What fuzzing begins with: every input ends in a result or in one short sentence."""

import pytest

from mr1_fast.errors import UserError

from .fuzz_readers import SECONDS, Counts, counted
from .targets import TARGETS


@pytest.mark.parametrize("name", TARGETS)
def test_inputs_to_begin_with(name, tmp_path, monkeypatch):
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    counts = Counts(tmp_path / f"{name}.json")
    call = TARGETS[name].make()
    seeds = list(TARGETS[name].seeds())
    for seed in seeds[:: len(seeds) // 150 + 1]:
        counted(call, seed, counts)
    counts.write()
    assert counts.read()["exceptions"] == 0, counts.shown
    assert counts.executions > 4 and counts.slowest < SECONDS


def test_what_is_a_fault(tmp_path):
    def call(content):
        raise {b"a": ValueError("x"), b"b": UserError("y" * 2000), b"c": UserError("z")}[content]

    counts = Counts(tmp_path / "judge.json")
    for content in (b"a", b"b", b"c", b"a"):
        counted(call, content, counts)
    assert (counts.executions, counts.exceptions) == (4, 3)
    assert {(tmp_path / name).read_bytes() for name in counts.shown} == {b"a", b"b"}
