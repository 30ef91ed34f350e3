"""Reading what a run has recorded: columns with holes, evaluations, and the end of a long file."""

import json
import os

import numpy as np
import pytest

from mr1_fast.errors import UserError
from mr1_fast.report import records
from mr1_fast.report.records import (
    read_evaluation,
    read_evaluations,
    read_last_step,
    read_metrics,
)


def test_columns_that_begin_late_or_end_early_have_holes(tmp_path):
    path = tmp_path / "metrics.jsonl"
    lines = ['{"a": 1, "b": 2.5}', '{"step": 7, "c": true}', '{"b": 1e200, "a": null}', '{"b": 10']
    path.write_text("\n".join(lines))
    found = read_metrics(path)
    assert list(found) == ["a", "b", "step", "c"] or list(found) == ["step", "a", "b", "c"]
    np.testing.assert_array_equal(found["step"], [0, 7, 2])
    np.testing.assert_array_equal(found["a"], [1, np.nan, np.nan])
    np.testing.assert_array_equal(found["b"], [2.5, np.nan, np.nan])
    np.testing.assert_array_equal(found["c"], [np.nan, 1, np.nan])
    assert {name: len(values) for name, values in read_metrics(tmp_path / "none").items()} == {
        "step": 0
    }


def test_evaluations(tmp_path):
    path = tmp_path / "evaluations.jsonl"
    path.write_text(
        '{"step": 0, "accuracy": 0.5, "interval": [0.4, 0.6], "seconds": 3}\n'
        '{"step": 5, "accuracy": 0.75, "interval": null}\n{"step": 10, "accu'
    )
    found = read_evaluations(path)
    np.testing.assert_array_equal(found["step"], [0, 5])
    np.testing.assert_array_equal(found["accuracy"], [0.5, 0.75])
    np.testing.assert_array_equal(found["low"], [0.4, np.nan])
    np.testing.assert_array_equal(found["high"], [0.6, np.nan])
    assert all(len(values) == 0 for values in read_evaluations(tmp_path / "none").values())
    path.write_text("7\n")
    with pytest.raises(UserError, match=r"evaluations\.jsonl line 1 "):
        read_evaluations(path)


def test_last_step_is_read_from_the_end_alone(tmp_path, monkeypatch):
    path = tmp_path / "completions.jsonl"
    rows = [
        {"step": step, "key": f"{step} {n} " + "x" * 80} for step in range(50) for n in range(3)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows) + '{"step": 50, "ke')
    assert read_last_step(path) == rows[-3:]

    monkeypatch.setattr(records, "LAST_BYTES", 300)
    assert read_last_step(path) == rows[-2:]  # and the end of the one before
    path.write_text("{\n" * 3 + path.read_text())
    assert read_last_step(path) == rows[-2:]
    path.write_text("{\n")
    with pytest.raises(UserError, match="a line at the end of"):
        read_last_step(path)
    path.write_text("")
    assert read_last_step(path) == [] == read_last_step(tmp_path / "none")


@pytest.mark.parametrize("read", [read_metrics, read_evaluations, read_last_step, read_evaluation])
def test_a_pipe_is_not_waited_for(read, tmp_path):
    os.mkfifo(path := tmp_path / "record")
    with pytest.raises(UserError, match="record is no file: move it away"):
        read(path)
