"""What an evaluation may overwrite: an earlier one, and nothing else."""

import json
import os
from pathlib import Path

import pytest

from mr1_fast.errors import UserError
from mr1_fast.evaluate.settings import parse

OURS = {"accuracy": 0.5, "results": [], "config": {}}


@pytest.fixture
def run_folder(tmp_path, monkeypatch):
    """A run folder, which is the current folder, too."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.yaml").write_text("steps: 3\n")
    (tmp_path / "final").mkdir()
    return tmp_path


@pytest.mark.parametrize("made", [None, {"before": {}, "after": {}}, OURS])
def test_the_record_of_a_run_is_not_overwritten_also_before_it_is_made(made, run_folder):
    if made is not None:
        Path("evaluation.json").write_text(json.dumps(made))
    for argv in ([], ["--output", str(run_folder / "evaluation.json")]):
        with pytest.raises(UserError, match=r"its own evaluation: choose another .* --output"):
            parse(argv)
    with pytest.raises(UserError, match=r"choose another .* --r1v-output"):
        parse(["--output=mine.json", "--r1v-output=evaluation.json"])
    assert parse(["--output=mine.json"]).output == "mine.json"


OF_OTHERS = {
    "metrics": b'{"step": 0, "accuracy": 0.5}\n',
    "a run's": b'{"before": {}, "after": {}}',
    "thesis": b"all my work",
    "binary": b"\xff\x00\x01",
    "list": b'["accuracy", "results"]',
    "deep": b"[" * 100_000,
}


@pytest.mark.parametrize("flag", ["output", "r1v_output"])
def test_a_file_of_something_else_is_left_alone(flag, tmp_path):
    others = {"output": ["--r1v-output"], "r1v_output": ["--output"]}[flag]
    other = f"{others[0]}={tmp_path / 'other'}"
    for name, content in OF_OTHERS.items():
        (path := tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{flag} is .*, which no evaluation has written"):
            parse([f"--{flag}={path}", other])
        assert path.read_bytes() == content
    with pytest.raises(UserError, match=f"{flag} is .*, which is a folder"):
        parse([f"--{flag}={tmp_path}", other])


def test_an_earlier_evaluation_an_empty_file_and_devices_may_be_written(tmp_path):
    (tmp_path / "ours").write_text(json.dumps(OURS))
    (tmp_path / "empty").touch()
    os.mkfifo(tmp_path / "pipe")
    for path in (*tmp_path.iterdir(), Path("/dev/null"), Path("/dev/stdout"), tmp_path / "new"):
        assert parse(["--output", str(path)]).output == str(path)
    with pytest.raises(UserError, match="name the same file"):
        parse([f"--output={tmp_path}/a", f"--r1v-output={tmp_path}/a"])
