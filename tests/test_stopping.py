"""Ctrl-C and SIGTERM at any moment, max_hours, and going on as if nothing had happened."""

import json
import os
import random
import re
import signal
import subprocess
import sys
import threading
import time
import traceback
import weakref
from contextlib import contextmanager, suppress
from importlib.util import find_spec, spec_from_file_location
from pathlib import Path

import pytest

from mr1_fast import preparing, stopping
from mr1_fast import run as run_module
from mr1_fast.command_line import parse_train_config
from mr1_fast.errors import STOP_SIGNALS, Stopped, UserError, exit_on_user_error
from mr1_fast.report.plots import PLOTS
from mr1_fast.resuming import saved_steps
from mr1_fast.stopping import StopSignals, TimeLimit
from mr1_fast.train import train

from .data.judge import toss
from .data.runs import assert_same_run, curve, metrics, records, run

SETTINGS = dict(steps=4, num_generations=2, eval_every=2, save_every=2, keep_best=True)
HANDLERS = [signal.getsignal(number) for number in STOP_SIGNALS]


@pytest.fixture(scope="module", autouse=True)
def quick_runs():
    """Runs have accuracies that go up and down, and no plots, which take half of their time."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mr1_fast.tasks.judge_completion", toss)
        patch.setattr("mr1_fast.report.plots.PLOTS", PLOTS[:2])
        yield


@pytest.fixture(autouse=True)
def handlers():
    """Every test leaves the handlers of signals as they were."""
    yield
    assert [signal.getsignal(number) for number in STOP_SIGNALS] == HANDLERS


@pytest.fixture(scope="module")
def whole(run_args, tmp_path_factory):
    """A run that nothing interrupts."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    run(run_args(folder, **SETTINGS))
    return folder


def stop(number=signal.SIGINT):
    os.kill(os.getpid(), number)


def stopped(argv, watch=None):
    """Train until a signal ends it; returns what the user is told."""
    with pytest.raises(Stopped) as told:
        train(parse_train_config(argv), watch)
    return told.value


@contextmanager
def judge_that_stops(when):
    """Send a signal while an item is judged, the first time that `when()` is true."""
    sent = []

    def judge(*texts, **options):
        if not sent and when():
            sent.append(stop())
        return toss(*texts, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("mr1_fast.tasks.judge_completion", judge)
        yield


def finish(folder):
    """Go on until the end; returns how often the run had to be resumed."""
    for resumed in range(1, 20):
        train(parse_train_config(["--resume", str(folder)]))
        if (folder / "final").exists():
            return resumed
    raise AssertionError("the run does not come to its end")


# --- the parts ----------------------------------------------------------------------------------


def test_a_signal_ends_loading_at_once_and_is_only_noted_later():
    with pytest.raises(Stopped) as told, StopSignals():
        stop(signal.SIGTERM)
    assert str(told.value) == "stopped while loading: nothing was written"
    assert told.value.status == 143

    with StopSignals() as signals:
        signals.defer(lambda: "go on with X")
        stop()
        assert signals.received == signal.SIGINT
        with pytest.raises(Stopped) as told:
            stop()
    assert str(told.value) == "stopped at once: go on with X" and told.value.status == 130


class Careless:
    """Its destructor, and a callback of a weak reference to it, get a signal; Python drops it."""

    def __del__(self):
        stop()


@pytest.mark.parametrize("number", STOP_SIGNALS)
@pytest.mark.parametrize("torchrun", ["", "none"])
def test_a_stop_that_python_drops_is_raised_again(torchrun, number, monkeypatch, capfd):
    """torchrun passes on a signal that its processes have got, too; that is not a second one."""
    if torchrun:
        monkeypatch.setenv("TORCHELASTIC_RUN_ID", torchrun)

    def drop():
        thing = threading.Event()
        weakref.finalize(thing, stop, number)
        del thing

    for how in (Careless, drop):
        with pytest.raises(Stopped) as told, StopSignals():
            how()
            time.sleep(9)
        assert str(told.value) == "stopped while loading: nothing was written"
        with pytest.raises(Stopped), StopSignals():  # as it ends
            how()
    assert capfd.readouterr().err == ""


def test_the_first_signal_names_torchruns_limit(monkeypatch, tmp_path, capfd):
    def told() -> str:
        with StopSignals() as signals:
            signals.defer(lambda: "go on with X")
            stop()
        return capfd.readouterr().err

    alone = "\nstopping: what has begun is finished and saved; a second signal stops at once\n"
    assert told() == alone
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    source = Path(find_spec("torch.distributed.run").origin).read_text()
    unless = ", unless it was started with a longer --shutdown-timeout"
    unless = unless if "--shutdown-timeout" in source else ""
    assert told() == f"{alone}torchrun kills what is not done after 30 s{unless}\n"

    (old := tmp_path / "run.py").write_text("--nproc-per-node")  # torch 2.11
    monkeypatch.setattr(stopping, "find_spec", lambda _: spec_from_file_location("run", old))
    assert told() == f"{alone}torchrun kills what is not done after 30 s\n"


def test_an_error_that_follows_a_signal_is_told_as_a_stop():
    """Ctrl-C ends the processes that a step waits for, too."""
    told = r"CalledProcessError came up \(Command .*\): go on with X$"
    with pytest.raises(Stopped, match=told), StopSignals() as signals:
        signals.defer(lambda: "go on with X")
        stop()
        subprocess.run(["false"], check=True)
    with pytest.raises(subprocess.CalledProcessError), StopSignals():
        subprocess.run(["false"], check=True)


@pytest.mark.parametrize("code", [0, None, 3, "bye"])
def test_nothing_that_a_run_calls_can_end_it_with_status_0(code):
    with (
        pytest.raises(UserError, match=r"has called sys\.exit\(.*\): remove that; go on with X\.$"),
        StopSignals() as signals,
    ):
        signals.defer(lambda: "go on with X")
        sys.exit(code)
    with pytest.raises(Stopped, match=r"^stopped: go on with X$") as told, StopSignals() as signals:
        signals.defer(lambda: "go on with X")
        raise KeyboardInterrupt
    assert told.value.status == 130


def test_an_unexpected_error_and_a_refusal_end_with_how_to_go_on(capsys):
    def fail(error):
        with StopSignals() as signals:
            signals.defer(lambda: "go on with X")
            raise error

    with pytest.raises(ZeroDivisionError) as raised:
        exit_on_user_error(lambda: fail(ZeroDivisionError("a fault")))
    assert traceback.format_exception(raised.value)[-1].endswith("go on with X\n")
    with pytest.raises(SystemExit) as ended:
        exit_on_user_error(lambda: fail(PermissionError(13, "Permission denied", "/a/file")))
    said = "error: /a/file cannot be used (Permission denied): change its permissions, or name "
    assert capsys.readouterr().err == f"{said}another place; go on with X.\n"
    assert ended.value.code == 2


def test_signals_are_left_alone_in_other_threads_and_where_they_are_ignored():
    found = []

    def look():
        with StopSignals():
            found.append(signal.getsignal(signal.SIGINT))

    thread = threading.Thread(target=look)
    thread.start(), thread.join()
    assert found == [HANDLERS[0]]
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        with StopSignals() as signals:
            stop()
            assert signals.received == 0
    finally:
        signal.signal(signal.SIGINT, HANDLERS[0])


def test_the_time_limit_counts_with_the_longest_of_the_recent_parts(monkeypatch):
    now = [100.0]
    monkeypatch.setattr(stopping.time, "monotonic", lambda: now[0])
    limit = TimeLimit(hours=0.01)  # 36 seconds
    assert limit.must_learn("save") and limit.leaves("step", "save")
    for part, seconds in (("step", 3.0), ("step", 9.0), ("step", 4.0), ("save", 2.0)):
        with limit.measure(part):
            now[0] += seconds
    assert not limit.must_learn("save")
    now[0] = 136.0 - 11.0
    assert limit.leaves("step", "save")
    now[0] += 0.1
    assert not limit.leaves("step", "save") and limit.leaves("step")
    for _ in range(stopping.RECENT):
        with limit.measure("step"):
            pass
    assert limit.leaves("step", "save")
    assert TimeLimit().leaves("step") and not TimeLimit().must_learn("save")


# --- whole runs, in this process ----------------------------------------------------------------


def test_before_the_first_step_nothing_is_left_that_hinders(whole, run_args, tmp_path, monkeypatch):
    argv = run_args(folder := tmp_path / "run", **SETTINGS)
    with monkeypatch.context() as patch:
        patch.setattr(preparing, "load_policy", lambda config: stop())
        assert "while loading: nothing was written" in str(stopped(argv))
    assert not folder.exists()

    with judge_that_stops(lambda: True):
        message = str(stopped(argv))
    way_on = f"begin again with `python -m mr1_fast.train --resume {folder}`"
    assert message == f"stopped after 0 of 4 steps: nothing was saved yet, so {way_on}"
    run(argv)
    assert_same_run(folder, whole)


def test_the_step_of_a_signal_is_saved_although_no_save_is_due(whole, run_args, tmp_path):
    argv = run_args(folder := tmp_path / "run", **SETTINGS | dict(save_every=0))
    told = stopped(argv, watch=lambda _, done: stop(signal.SIGTERM) if done == 3 else None)
    way_on = f"go on with `python -m mr1_fast.train --resume {folder}`"
    assert str(told) == f"stopped after 3 of 4 steps: {way_on}" and told.status == 143
    assert saved_steps(folder / "checkpoints") == [3] and not (folder / "final").exists()
    assert (folder / "report.html").exists()
    run(["--resume", str(folder)])
    assert_same_run(folder, whole)


def test_an_evaluation_on_the_way_is_left_and_made_again(whole, run_args, tmp_path):
    argv, folder = run_args(tmp_path / "run", **SETTINGS), tmp_path / "run"
    steps = []
    with judge_that_stops(lambda: 2 in steps):
        stopped(argv, watch=lambda _, done: steps.append(done))
    assert [point["step"] for point in curve(folder)] == [0]
    assert saved_steps(folder / "checkpoints") == [2]
    run(["--resume", str(folder)])
    assert_same_run(folder, whole)


def test_a_save_is_completed(whole, run_args, tmp_path, monkeypatch):
    argv, folder = run_args(tmp_path / "run", **SETTINGS), tmp_path / "run"

    def stop_and_save(*arguments, **options):
        stop()
        return save_checkpoint(*arguments, **options)

    save_checkpoint = run_module.save_checkpoint
    with monkeypatch.context() as patch:
        patch.setattr(run_module, "save_checkpoint", stop_and_save)
        assert "after 2 of 4 steps" in str(stopped(argv))
    assert saved_steps(folder / "checkpoints") == [2] and len(metrics(folder)) == 2
    run(["--resume", str(folder)])
    assert_same_run(folder, whole)


def test_final_stands_where_the_evaluation_after_training_is_left(whole, run_args, tmp_path):
    argv, folder = run_args(tmp_path / "run", **SETTINGS), tmp_path / "run"
    with judge_that_stops(lambda: (folder / "final").exists()):
        assert f"after 4 of 4 steps: {folder / 'final'} is whole; `python" in str(stopped(argv))
    final = (folder / "final/model.safetensors").read_bytes()
    assert final == (whole / "final/model.safetensors").read_bytes()
    run(["--resume", str(folder)])
    assert_same_run(folder, whole)


def test_a_second_signal_stops_at_once(whole, run_args, tmp_path):
    argv, folder = run_args(tmp_path / "run", **SETTINGS), tmp_path / "run"
    told = stopped(argv, watch=lambda _, done: (stop(), stop()) if done == 3 else None)
    assert str(told).startswith("stopped at once: go on with `python -m mr1_fast.train --resume")
    assert saved_steps(folder / "checkpoints") == [2] and len(metrics(folder)) == 3
    assert not (folder / "report.html").exists()
    run(["--resume", str(folder)])
    assert_same_run(folder, whole)


@pytest.mark.parametrize("stage", ["write_card", "push_in_time"])
def test_what_comes_after_final_is_told_of(stage, run_args, tmp_path, monkeypatch):
    settings = dict(steps=1, num_generations=2, eval_samples=0, save_every=1)
    argv, folder = run_args(tmp_path / "run", **settings), tmp_path / "run"
    config = parse_train_config(argv)
    monkeypatch.setattr(preparing, "require_repository", lambda name: None)
    config.push_to_hub = "me/model"
    monkeypatch.setattr(f"mr1_fast.train.{stage}", lambda *_: stop())
    monkeypatch.setattr("mr1_fast.log.RunLog.say", lambda self, text: None)
    with pytest.raises(Stopped) as told:
        train(config)
    assert str(told.value).startswith(f"stopped after 1 of 1 steps: {folder}/final is whole; `")


def test_at_random_moments(whole, run_args, tmp_path):
    """Each time the signal comes at another moment: in loading, a step, an evaluation, a save."""
    folder, seed = tmp_path / "run", random.randrange(10**6)
    print(f"seed of the moments: {seed}")  # pytest shows it where the test fails
    argv, draw = run_args(folder, **SETTINGS), random.Random(seed)
    for _ in range(3):
        timer = threading.Timer(draw.uniform(0.1, 3.0), stop)
        with suppress(KeyboardInterrupt):
            try:
                timer.start()
                train(parse_train_config(argv))
            finally:
                timer.cancel()  # it may come while this is done, but not later
                timer.join()
        if saved_steps(folder / "checkpoints"):
            argv = ["--resume", str(folder)]
    train(parse_train_config(argv))
    assert_same_run(folder, whole)


def test_max_hours_end_a_run_that_goes_on(whole, run_args, tmp_path, capsys):
    folder, hours = tmp_path / "run", 1e-6
    train(parse_train_config(run_args(folder, **SETTINGS | dict(save_every=0, max_hours=hours))))
    assert saved_steps(folder / "checkpoints") == [1] and not (folder / "final").exists()
    assert (folder / "report.html").exists()
    way_on = f"go on with `python -m mr1_fast.train --resume {folder}`"
    assert f"max_hours are over after 1 of 4 steps: {way_on}" in capsys.readouterr().out
    assert finish(folder) == 4  # three steps, and what follows the last one
    assert_same_run(folder, whole)
    run(["--resume", str(folder), "--max-hours", "99"])
    assert_same_run(folder, whole)


def test_a_resumed_run_knows_how_long_its_evaluations_take(run_args, tmp_path):
    """It ends in time before one that would take longer than what is left of its hours."""
    settings = SETTINGS | dict(steps=3, eval_samples=3, save_every=1, keep_best=False)
    argv, folder = run_args(tmp_path / "run", **settings), tmp_path / "run"
    stopped(argv, watch=lambda _, done: stop() if done == 1 else None)
    (line,) = records(folder / "evaluations.jsonl")
    line["seconds"] = 99 * 3600
    (folder / "evaluations.jsonl").write_text(json.dumps(line) + "\n")
    prepared = preparing.prepare(parse_train_config(["--resume", str(folder), "--max-hours", "9"]))
    limit = prepared.time_limit
    assert limit.leaves("greedy evaluation")  # before its first step
    limit.note("step", 0.1)
    assert limit.leaves("step", "save")
    assert not limit.leaves("greedy evaluation") and not limit.leaves("sampled evaluation")
    assert prepared.end(1) == "time" == prepared.end(3) and prepared.end(2) == ""


# --- the commands -------------------------------------------------------------------------------


def command(module, *argv):
    """Start a command in a process group of its own, as a terminal does."""
    return subprocess.Popen(
        [sys.executable, "-m", f"mr1_fast.{module}", *map(str, argv)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        # The background of a script, in which tests may run, ignores Ctrl-C.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )


def wait_for(path, process):
    """Wait until a running process has written a file."""
    deadline = time.monotonic() + 100
    while not path.exists():
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def ended(process, status):
    """Wait for the end of a process; returns its last line, which must be no traceback."""
    _, errors = process.communicate(timeout=100)
    assert "Traceback" not in errors and process.returncode == status, errors
    return errors.replace("\r", "\n").splitlines()[-1]


def test_ctrl_c_reaches_all_processes_of_a_run(run_args, tmp_path):
    """math-verify's process still answers for the step that is finished."""
    settings = dict(steps=8, eval_samples=0, save_every=0, num_generations=2, judge="r1v")
    run(run_args(tmp_path / "whole", **settings))
    process = command("train", *run_args(folder := tmp_path / "run", **settings))
    wait_for(folder / "metrics.jsonl", process)
    os.killpg(process.pid, signal.SIGINT)
    assert ended(process, 130).endswith(f"`python -m mr1_fast.train --resume {folder}`")
    (step,) = saved_steps(folder / "checkpoints")
    assert step == len(metrics(folder)) < 8 and not (folder / "final").exists()
    run(["--resume", str(folder)])
    assert metrics(folder) == metrics(tmp_path / "whole")
    name = "final/model.safetensors"
    assert (folder / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


@pytest.mark.parametrize(
    "module, number",
    [
        ("train", signal.SIGINT),
        ("train", signal.SIGTERM),
        ("evaluate", signal.SIGINT),
        ("plan", signal.SIGTERM),
        ("experiment", signal.SIGINT),
        ("report", signal.SIGTERM),
        ("push", signal.SIGINT),
        ("merge", signal.SIGTERM),
        ("env", signal.SIGINT),
    ],
)
def test_every_command_ends_in_silence_while_it_imports(number, module, run_args, tmp_path):
    argv = {
        "train": run_args(tmp_path / "run"),
        "evaluate": ["--samples", 2],
        "plan": ["--model", "tiny"],
        "experiment": ["--preset", "tiny", "--dry-run"],
        "report": [tmp_path],
        "push": [tmp_path],
        "merge": [tmp_path, "--output", tmp_path / "merged"],
        "env": [],
    }
    process = command(module, *argv[module])
    deadline = time.monotonic() + 50
    while not catches_sigterm(process.pid) and time.monotonic() < deadline:
        time.sleep(0.001)
    os.killpg(process.pid, number)
    assert ended(process, 128 + number).startswith("stopped")
    assert not list(tmp_path.iterdir())


def catches_sigterm(pid):
    """Whether a process has its handlers: the one for Ctrl-C is set before that for SIGTERM."""
    (mask,) = re.findall(r"^SigCgt:\s*(\w+)", Path(f"/proc/{pid}/status").read_text(), re.M)
    return int(mask, 16) >> (signal.SIGTERM - 1) & 1


MOMENTS = int(os.environ.get("MR1_FAST_MOMENTS", "6"))
"""How often each command gets a signal, at a random moment of its life."""


def made(name, folder, model, run_args):
    """Return the arguments of a command, whose results go to a folder."""
    settings = SETTINGS | dict(save_every=1, max_new_tokens=6)
    evaluated = ["--model", model, "--device", "cpu", "--samples", 4, "--max-new-tokens", 6]
    finished = folder.parent / "finished"
    return {
        "train": run_args(folder, **settings),
        "evaluate": [*evaluated, "--output", folder / "evaluation.json"],
        "merge": [finished / "final" / "adapter", "--output", folder / "merged"],
        "report": [finished],
        "push": [finished, "me/model"],
        "plan": ["--model", "Qwen/Qwen2-VL-2B-Instruct"],
        "env": [],
        "experiment": [
            *("--output", folder, "--seeds", "[0]", "--test-items", 4),
            *("--settings", json.dumps({"model": str(model), "steps": 1, "max_new_tokens": 6})),
        ],
    }[name]


@pytest.mark.thorough
@pytest.mark.parametrize(
    "name", ["train", "evaluate", "merge", "report", "push", "plan", "env", "experiment"]
)
def test_any_command_at_random_moments(name, run_args, tiny_folder, tmp_path, monkeypatch):
    """It ends without a traceback, its last line says that it was stopped, and nothing is half."""
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")  # an upload may begin, and fails
    if name in ("merge", "report", "push"):
        run(run_args(tmp_path / "finished", steps=1, eval_samples=0, lora=True, save="both"))
    started = time.monotonic()
    process = command(name, *made(name, tmp_path / "whole", tiny_folder, run_args))
    _, errors = process.communicate(timeout=600)
    whole, status = time.monotonic() - started, process.returncode
    assert status == (2 if name == "push" else 0), errors

    seed = random.randrange(10**6)
    print(f"seed of the moments: {seed}")
    draw = random.Random(seed)
    for moment in range(MOMENTS):
        folder, number = tmp_path / str(moment), draw.choice(STOP_SIGNALS)
        process = command(name, *made(name, folder, tiny_folder, run_args))
        deadline = time.monotonic() + draw.uniform(0, whole)
        while not catches_sigterm(process.pid):  # Python itself still begins
            time.sleep(0.001)
        time.sleep(max(0.0, deadline - time.monotonic()))
        process.send_signal(number)
        _, errors = process.communicate(timeout=600)
        assert "Traceback" not in errors, errors
        assert not list(tmp_path.rglob("*.partial"))
        # One that comes while Python ends itself finds the work done.
        assert process.returncode in (128 + number, -number, status), errors
        if process.returncode == 128 + number:
            last = errors.replace("\r", "\n").strip().splitlines()[-1]
            assert last.startswith("stopped"), errors
        if name == "train" and saved_steps(folder / "checkpoints"):
            run(["--resume", str(folder)])
            assert metrics(folder) == metrics(tmp_path / "whole")
