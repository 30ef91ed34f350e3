"""Further processes of an experiment: how many, what becomes of them, and that cells are equal."""

import errno
import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch

from mr1_fast import locks
from mr1_fast.errors import Stopped
from mr1_fast.experiment import workers as workers_module
from mr1_fast.experiment.__main__ import main
from mr1_fast.experiment.command import make_experiment
from mr1_fast.experiment.settings import ExperimentConfig
from mr1_fast.experiment.workers import at_a_time, needed, workers

from ..data.cells import lasting_files
from ..data.scripts import run_script


def test_as_many_cells_run_at_a_time_as_torch_has_threads(tiny_folder, monkeypatch, tmp_path):
    def made(model="tiny"):
        settings = {"model": str(model), "device": "cpu"}
        config = ExperimentConfig(seeds=[0], settings=settings, output=str(tmp_path))
        return make_experiment(config)

    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    assert at_a_time(made()) == 4 and at_a_time(made(), 1) == 1 and at_a_time(made(), 3) == 3
    monkeypatch.setattr(torch, "get_num_threads", lambda: 64)
    assert at_a_time(made()) == 8 and at_a_time(made(), 64) == 64
    assert at_a_time(made(tiny_folder)) == 1 and at_a_time(made(tiny_folder), 2) == 2
    cells = made().cells()
    assert needed(made(), 100) == len(cells) - 1 and needed(made(), 4) == 3
    for left, cell in zip(range(len(cells) - 1, -1, -1), cells, strict=True):
        cell.folder(tmp_path).mkdir(parents=True)
        (cell.folder(tmp_path) / "cell.json").touch()
        assert needed(made(), 4) == max(0, min(4, left) - 1) and needed(made(), 1) == 0


def test_without_locks_no_process_is_started(monkeypatch, capsys, tmp_path):
    def has_none(file, kind):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(locks.fcntl, "flock", has_none)
    assert needed(make_experiment(ExperimentConfig(output=str(tmp_path))), 2) == 0
    assert "has no locks: run no other command in it" in capsys.readouterr().out


def test_a_dry_runs_total_is_that_of_the_cells_that_run_at_a_time(capsys, tmp_path):
    def told(count, preset):
        arguments = ["--processes", str(count), "--output", str(tmp_path / "out"), "--dry-run"]
        main(["--preset", preset, "--seeds", "[0]", *arguments])
        lines = capsys.readouterr().out.splitlines()
        times = [float(line[68:].split()[0]) for line in lines[1:] if " to do " in line]
        (total,) = (line for line in lines if line.startswith("all that is left, "))
        return times, total.split("  ")[0].split(", ")[1], float(total[68:].split()[0])

    times, how, one_by_one = told(1, "tiny_generations")
    assert how == "one cell after the other" and one_by_one == pytest.approx(sum(times), abs=0.3)
    _, how, total = told(2, "tiny_generations")
    assert how == "2 cells at a time" and total == pytest.approx(one_by_one / 2, abs=0.1)
    assert total > told(100, "tiny_generations")[2] == max(times)  # as long as the longest cell
    # On a card, times are those of one cell alone, and of more at a time nothing is known.
    assert told(2, "qwen2vl_2b")[1:] == told(1, "qwen2vl_2b")[1:]


def test_what_a_process_dies_of_is_told_once(capfd):
    with workers(2, [str(os.getpid()), "0", "--no-such-flag"]) as others:
        for process, _ in others.running:
            process.wait()
        others.tell_deaths()
        others.tell_deaths()
    said = capfd.readouterr().out.splitlines()
    assert len(said) == 2 and len(set(said)) == 1
    assert said[0].startswith("a process has died (error: ") and "no-such-flag" in said[0]


def test_without_room_for_a_process_the_first_one_goes_on(monkeypatch, capsys):
    def refuse(*_, **__):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    monkeypatch.setattr(workers_module.subprocess, "Popen", refuse)
    with workers(2, []) as others:
        assert not others.running
    assert "no process can be started (Resource temporarily" in capsys.readouterr().out


PARENT = """
import os, subprocess, signal
code = "import os; from mr1_fast.experiment.worker import end_with; end_with(os.getppid());"
code += "import time; print(os.getpid(), flush=True); time.sleep(60)"
child = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE)
print(int(child.stdout.readline()), flush=True)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_a_process_ends_with_the_first_one(tmp_path):
    child = int(run_script(tmp_path / "parent.py", PARENT).stdout)
    deadline = time.monotonic() + 20
    while is_alive(child):
        assert time.monotonic() < deadline
        time.sleep(0.05)


def is_alive(process):
    try:
        with open(f"/proc/{process}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_ctrl_c_ends_all_processes_and_cells_are_those_of_one(tiny_folder, capsys, tmp_path):
    settings = {"model": str(tiny_folder), "steps": 10, "max_new_tokens": 6, "device": "cpu"}
    arguments = ["--preset", "tiny_generations", "--seeds", "[0]", "--test-items", "4"]
    arguments += ["--settings", json.dumps(settings | {"prompts_per_step": 2})]
    shared, alone = tmp_path / "shared", tmp_path / "alone"
    command = [sys.executable, "-m", "mr1_fast.experiment", *arguments, "--processes", "2"]
    process = subprocess.Popen(
        [*command, "--output", str(shared)],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    deadline = time.monotonic() + 100
    while not list(shared.rglob("metrics.jsonl")):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.05)
    others = children(process.pid)
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=100)
    assert process.returncode == Stopped(signal.SIGINT).status, errors
    assert errors.strip().endswith("stopped: run the command again to go on")
    assert len(others) == 1 and not is_alive(others[0])
    assert not list(shared.rglob("failed.json")) and (shared / "report.html").exists()

    for output in (shared, alone):
        main([*arguments, "--output", str(output)])
        lines = capsys.readouterr().out.splitlines()
        assert [line[:5] for line in lines[:-1]] == [f"[{n}/4]" for n in range(1, 5)]
    seen = [lasting_files(output) for output in (shared, alone)]
    assert seen[0] == seen[1] and sum(name.endswith("cell.json") for name in seen[0]) == 4


def children(parent):
    """The processes of worker.py that a process has started."""
    found = []
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as file, open(f"/proc/{name}/cmdline") as words:
                is_child = int(file.read().rpartition(")")[2].split()[1]) == parent
                if is_child and "mr1_fast.experiment.worker" in words.read():
                    found.append(int(name))
        except (FileNotFoundError, ProcessLookupError):
            pass
    return found
