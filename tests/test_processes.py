"""Processes of this package's commands."""

import subprocess

from mr1_fast.processes import module_process


def test_the_working_directory_is_not_searched_for_modules(tmp_path, monkeypatch):
    monkeypatch.delenv("PYTHONPATH", raising=False)
    for name in ("argparse.py", "json.py", "mr1_fast.py"):
        (tmp_path / name).write_text("raise SystemExit('taken from the working directory')")
    command, environment = module_process("mr1_fast.push", "--help")
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0 and "mr1_fast.push" in done.stdout, done.stderr
