"""Who may write to a run's folder, and what a run that begins there may find."""

import json
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from mr1_fast import run_folder
from mr1_fast.command_line import parse_train_config
from mr1_fast.config import TrainConfig
from mr1_fast.distributed import SINGLE
from mr1_fast.errors import UserError
from mr1_fast.locks import LOCK, exclusive, locked, one_at_a_time
from mr1_fast.log import RunLog
from mr1_fast.resuming import FIRST_LINE, LAST_LINE, write_config
from mr1_fast.run_folder import FILES, FOLDERS, hold_run_folder

from .data.runs import assert_same_run, metrics, run

HOLD = """
import sys, time
from pathlib import Path
from mr1_fast.locks import exclusive
with exclusive(Path(sys.argv[1]), "taken"):
    print("held", flush=True)
    time.sleep(60)
"""


def content(folder: Path) -> dict:
    """Every file below a folder but its lock, as bytes."""
    return {
        str(path.relative_to(folder)): path.read_bytes()
        for path in folder.rglob("*")
        if path.is_file() and path.name != LOCK
    }


def test_a_second_training_changes_nothing_until_the_first_has_died(run_args, tmp_path):
    folder = tmp_path / "run"
    argv = run_args(folder, save_every=2, steps=4)
    run(argv)
    before = content(folder)
    holder = subprocess.Popen([sys.executable, "-c", HOLD, folder], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    for second in (
        argv,
        ["--resume", str(folder), "--steps=6"],
        [*argv, "--resume=auto", "--steps=6"],
    ):
        started = time.perf_counter()
        with pytest.raises(UserError, match=f"output {folder} is in use by another training: wait"):
            run(second)
        assert time.perf_counter() - started < 5 and content(folder) == before
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    holder.stdout.close()
    run(["--resume", str(folder), "--steps=6"])
    assert [each["step"] for each in metrics(folder)] == list(range(6))
    assert not (folder / LOCK).exists()


@pytest.mark.parametrize("lock", ["of a run", "of a folder", "of what is made once"])
def test_a_child_that_outlives_a_killed_process_does_not_keep_its_lock(lock, tmp_path):
    """As the processes of a reward's pool do, which wait for ever for their next work."""

    def held():
        if lock == "of a run":
            return exclusive(tmp_path / "run", "taken")
        if lock == "of a folder":
            return locked(tmp_path, seconds=0, must=True)
        return one_at_a_time(tmp_path / "made", "no way out")

    reading, writing = os.pipe()
    if not (process := os.fork()):
        try:
            with held():
                if not (child := os.fork()):
                    os.close(writing)
                    signal.pause()
                os.write(writing, b"%d" % child)
                os.kill(os.getpid(), signal.SIGKILL)
        finally:
            os._exit(1)  # never go on with the tests here
    os.close(writing)
    child = int(os.read(reading, 20))
    os.close(reading)
    entered = threading.Event()

    def enter():
        with held():
            entered.set()

    try:
        os.waitpid(process, 0)
        threading.Thread(target=enter, daemon=True).start()
        assert entered.wait(timeout=20)
    finally:
        os.kill(child, signal.SIGKILL)


def test_trainings_of_one_second_get_folders_of_their_own(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(run_folder.time, "strftime", lambda _: "now")
    names, barrier, go_on = [], threading.Barrier(9), threading.Event()

    def begin():
        config = TrainConfig()
        barrier.wait()
        with hold_run_folder(config, SINGLE):
            names.append(config.output)
            go_on.wait(30)

    threads = [threading.Thread(target=begin) for _ in range(8)]
    for thread in threads:
        thread.start()
    barrier.wait()
    while len(names) < 8 and any(thread.is_alive() for thread in threads):
        time.sleep(0.01)
    made = {f"runs/{path.name}" for path in (tmp_path / "runs").iterdir()}
    go_on.set()
    for thread in threads:
        thread.join()
    first = "runs/now-counting-grpo-d-seed0"
    assert set(names) == made == {first, *(f"{first}-{number}" for number in range(2, 9))}
    assert list(tmp_path.glob("runs/*")) == [], "nothing was written, so nothing is left"


def test_one_of_many_gets_the_lock_whenever_they_come_and_go(tmp_path):
    inside, most, done = [], [], []

    def work():
        while len(done) < 200:
            try:
                with exclusive(tmp_path / "deep" / "run", "taken"):
                    inside.append(1)
                    most.append(len(inside))
                    done.append(1)
                    inside.pop()
                (tmp_path / "deep" / "run").rmdir()
            except (UserError, OSError):
                continue

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert set(most) == {1}


def test_a_folder_that_a_run_could_not_begin_in_is_as_it_was(tmp_path):
    for there in (tmp_path, tmp_path / "a", tmp_path / "a" / "b"):
        there.mkdir(exist_ok=True)
        (tmp_path / "kept").touch()
        with (
            pytest.raises(ZeroDivisionError),
            hold_run_folder(TrainConfig(output=str(tmp_path / "a" / "b" / "c")), SINGLE),
        ):
            raise ZeroDivisionError
        assert list(there.iterdir()) == [tmp_path / "kept"] * (there == tmp_path)


def test_an_output_that_is_no_folder_stays_what_it_is(run_args, tmp_path):
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "file").write_text("all my work")
    (tmp_path / "link").symlink_to(tmp_path / "file")
    for output in ("/dev/null", tmp_path / "pipe", tmp_path / "file", tmp_path / "link"):
        with pytest.raises(UserError, match=f"output {output} is no folder: choose another"):
            run(run_args(output))
    assert (tmp_path / "file").read_text() == "all my work" and (tmp_path / "pipe").is_fifo()
    assert Path("/dev/null").is_char_device()


STAGES = {
    "the folder alone": ["run"],
    "the folder with a dead lock": [LOCK],
    "the settings": [LOCK, "config.yaml"],
    "an evaluation half written": ["config.yaml", "images/", ".evaluation.json.0a.partial"],
    "the evaluation before": ["config.yaml", "evaluation.json"],
    "steps": ["config.yaml", "metrics.jsonl", "completions.jsonl", "evaluation.json"],
    "half a checkpoint": ["config.yaml", "metrics.jsonl", "checkpoints/.step-000002.partial/"],
}
"""What there is of a run in the order in which it comes to be, before its first checkpoint."""


@pytest.mark.parametrize("kind", ["pipe", "link to nothing", "the wrong one"])
def test_what_has_the_name_of_a_runs_own_is_told_before_training(kind, tmp_path):
    """A pipe would be waited for, and what stands in the way of final/ be found after training."""
    for name in (*FILES, LOCK, *FOLDERS):
        path = tmp_path / name
        if kind == "pipe":
            os.mkfifo(path)
        elif kind == "link to nothing":
            path.symlink_to("nothing")
        else:
            path.write_text("") if name in FOLDERS else path.mkdir()
        if kind == "link to nothing" and name not in FOLDERS:
            path.unlink()  # a file takes its place
            continue
        what = "folder" if name in FOLDERS else "file"
        held = hold_run_folder(TrainConfig(output=str(tmp_path)), SINGLE)
        with pytest.raises(UserError, match=f"{name} is no {what}: move it away"), held:
            pass
        path.rmdir() if path.is_dir() else path.unlink()


@pytest.mark.parametrize("stage", STAGES)
def test_killed_before_its_first_checkpoint_what_is_said_to_go_on_does(stage, tmp_path):
    folder = tmp_path / "run"
    config = parse_train_config(["--output", str(folder), "--steps=7"])
    for name in STAGES[stage]:
        path = folder / name
        (path if name.endswith("/") else path.parent).mkdir(parents=True, exist_ok=True)
        if name == "config.yaml":
            write_config(config, path)
        elif name != "run" and not name.endswith("/"):
            path.write_text('{"step": 0}\n')
    if stage == "the folder alone":
        shutil.rmtree(folder / "run", ignore_errors=True)

    ways = []
    try:
        RunLog(config)
        ways.append("anew")
    except UserError as error:
        named = f"begin its run again by `python -m mr1_fast.train --resume {folder}`."
        assert str(error).endswith(named)
        ways.append("named")
    try:
        again = parse_train_config(["--resume", str(folder)])
        assert (again.resume, again.output, again.steps) == ("auto", str(folder), 7)
        log = RunLog(again)
        assert not log.resuming
        ways.append("resume")
    except UserError as error:
        assert "there is no" in str(error) and "config.yaml" not in STAGES[stage]
    assert "anew" in ways or ways == ["named", "resume"]
    assert RunLog(parse_train_config([f"--output={folder}", "--resume=auto"]))


def test_a_run_that_begins_again_is_as_if_it_had_never_been_killed(run_args, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    settings = dict(steps=3, save_every=3, eval_every=2)
    run(run_args(whole, **settings))
    shutil.copytree(whole, killed)
    for name in ("checkpoints", "final"):
        shutil.rmtree(killed / name)
    (killed / "finished.json").unlink()
    write_config(parse_train_config(run_args(killed, **settings)), killed / "config.yaml")
    with (killed / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "rew')
    with pytest.raises(UserError, match=f"again by `python -m mr1_fast.train --resume {killed}`"):
        run(run_args(killed, **settings))
    assert RunLog(parse_train_config(["--resume", str(killed)])).way_on() == (
        f"nothing was saved yet, so begin again with `python -m mr1_fast.train --resume {killed}`"
    )
    run(["--resume", str(killed)])
    assert_same_run(killed, whole)


def test_a_checkpoint_that_came_meanwhile_is_not_begun_over(tmp_path):
    config = parse_train_config([f"--output={tmp_path}", "--resume=auto"])
    write_config(config, tmp_path / "config.yaml")
    (tmp_path / "metrics.jsonl").write_text('{"step": 0}\n')
    RunLog(config)
    (tmp_path / "checkpoints" / "step-000001").mkdir(parents=True)
    with pytest.raises(UserError, match="go on with its run by `python "):
        RunLog(config)


def test_a_finished_run_without_checkpoints_offers_no_way_that_fails(tmp_path):
    config = parse_train_config([f"--output={tmp_path}"])
    write_config(config, tmp_path / "config.yaml")
    (tmp_path / "final").mkdir()
    for argv in ([f"--output={tmp_path}"], ["--resume", str(tmp_path)]):
        with pytest.raises(UserError, match=r"is not empty: choose a new folder\.$"):
            RunLog(parse_train_config(argv))


def test_settings_that_are_cut_anywhere_are_refused_and_the_same_ones_not_rewritten(tmp_path):
    path = tmp_path / "config.yaml"
    config = parse_train_config([f"--output={tmp_path}", "--loggers=[tensorboard, wandb]"])
    write_config(config, path)
    whole, state = path.read_bytes(), path.stat()
    write_config(config, path)
    assert path.stat().st_ino == state.st_ino and path.stat().st_mtime_ns == state.st_mtime_ns
    plain = whole.removeprefix(f"{FIRST_LINE}\n".encode()).removesuffix(f"{LAST_LINE}\n".encode())
    last = plain.index(b"\nloggers")
    for text, most in ((whole, len(whole)), (plain, last)):  # the second as earlier versions wrote
        for size in {*range(0, most, 37), most - 1, most - 2}:
            path.write_bytes(text[:size])
            with pytest.raises(UserError, match=r"config.yaml is damaged, since its end is"):
                parse_train_config(["--resume", str(tmp_path)])
            # The way that is left, and no other one, is named.
            (tmp_path / "metrics.jsonl").touch()
            with pytest.raises(UserError, match=r"not empty: choose a new folder\.$"):
                RunLog(config)
            (tmp_path / "metrics.jsonl").unlink()
        path.write_bytes(text)
        assert parse_train_config(["--resume", str(tmp_path)]).loggers == config.loggers
    for zeroed in (b"\0" * len(whole), whole[:300] + b"\0" * 40 + whole[340:]):
        path.write_bytes(zeroed)
        with pytest.raises(UserError, match="config"):
            parse_train_config(["--resume", str(tmp_path)])
    path.unlink()
    path.mkdir()
    with pytest.raises(UserError, match=r"there is no .*config.yaml"):
        parse_train_config(["--resume", str(tmp_path)])


def test_settings_on_a_full_disk_stay_as_they_are(tmp_path):
    config = parse_train_config([f"--output={tmp_path}"])
    write_config(config, tmp_path / "config.yaml")
    before = content(tmp_path)
    code = (
        "import resource, sys; from pathlib import Path\n"
        "from mr1_fast.resuming import write_config\n"
        "from mr1_fast.command_line import parse_train_config\n"
        "config = parse_train_config(['--resume', sys.argv[1], '--steps=9'])\n"
        "for limit in (0, 100, 500):\n"
        "    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))\n"
        "    try:\n        write_config(config, Path(sys.argv[1]) / 'config.yaml')\n"
        "    except Exception as error:\n        print(type(error).__name__, error)\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code, tmp_path], capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert len(lines) == 3 and all("config.yaml cannot be written (File too" in x for x in lines)
    assert content(tmp_path) == before


def test_settings_that_were_changed_by_hand_are_noticed(run_args, tmp_path):
    run(run_args(tmp_path, steps=1, eval_samples=0))
    path = tmp_path / "config.yaml"
    before = path.read_text()
    state = json.loads((tmp_path / "checkpoints/step-000001/state.json").read_text())
    assert state["identity"]["learning_rate"] == 1e-3
    path.write_text(before.replace("learning_rate: 0.001", "learning_rate: 0.5"))
    told = r"learning_rate is 0.5, but the run in .* with 0.001, .*: write that into its config"
    with pytest.raises(UserError, match=told):
        run(["--resume", str(tmp_path)])
    path.write_text(before)
    run(["--resume", str(tmp_path)])
