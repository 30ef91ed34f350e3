"""Whether a run that `--resume auto` names is finished."""

import json
import os

import pytest

from mr1_fast.command_line import parse_train_config
from mr1_fast.resuming import FINISHED

from .data.runs import run


def test_resume_auto_leaves_a_finished_run_as_it_is(run_args, tmp_path, capsys):
    argv = [*run_args(tmp_path, steps=1, eval_samples=2), "--resume=auto"]
    run(argv)
    before = {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")}
    capsys.readouterr()
    with pytest.raises(SystemExit) as end:
        run(argv)
    final, report = tmp_path / "final", tmp_path / "report.html"
    told = f"the run is finished, with all of its 1 steps: {final} · report {report}"
    assert end.value.code == 0 and capsys.readouterr().out == f"{told}\n"
    with pytest.raises(SystemExit):
        parse_train_config([*argv, "--push-to-hub=me/it"])
    again = f"{told} · `python -m mr1_fast.push {tmp_path}` uploads it again\n"
    assert capsys.readouterr().out == again
    assert {path: path.stat().st_mtime_ns for path in tmp_path.rglob("*")} == before

    # More steps, or the folder by its name, and it goes on.
    assert parse_train_config([*argv, "--steps=2"]).resume == str(tmp_path)
    assert parse_train_config(["--resume", str(tmp_path)]).resume == str(tmp_path)

    # Clocks jump, so times of files do not count. A note does, unless of fewer steps, or damaged.
    os.utime(tmp_path / "final" / "README.md", (0, 0))
    with pytest.raises(SystemExit):
        parse_train_config(argv)
    note = tmp_path / FINISHED
    for damaged in ('{"steps": 0}', '{"steps"', "", "[1]", '"\\ud800"'):
        note.write_text(damaged)
        assert parse_train_config(argv).resume == str(tmp_path)

    # Earlier versions had no note: what is older than the last checkpoint is that of fewer steps.
    note.unlink()
    os.utime(tmp_path / "final" / "README.md")
    for name in ("final/README.md", "evaluation.json"):
        path, old = tmp_path / name, (tmp_path / "checkpoints" / "step-000001").stat().st_mtime - 9
        now = path.stat().st_mtime
        os.utime(path, (old, old))
        assert parse_train_config(argv).resume == str(tmp_path)
        os.utime(path, (now, now))

    # An end that was cut short is made again.
    (tmp_path / "evaluation.json").unlink()
    run(argv)
    assert json.loads((tmp_path / "evaluation.json").read_text())["final_step"] == 1
