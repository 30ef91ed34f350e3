"""How all processes end when one of them fails: one sentence, whichever it is and whenever."""

import json
import multiprocessing
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from mr1_fast import ending
from mr1_fast.distributed import launch
from mr1_fast.distributed.launch import join_world, leave_world
from mr1_fast.errors import UserError, exit_on_user_error
from mr1_fast.stopping import StopSignals
from tests.data.gang import PRELOADED, as_one_of

ROOT = Path(__file__).parents[1]


STOPPED = """
import os, signal, time
from contextlib import nullcontext
from mr1_fast.errors import exit_on_user_error, exit_when_stopped
from mr1_fast.stopping import StopSignals
if "imports" in os.environ:
    exit_when_stopped()
def main():
    with StopSignals() if "loads" in os.environ else nullcontext():
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(9)
exit_on_user_error(main) if "imports" not in os.environ else main()
"""


@pytest.mark.parametrize(
    "phase, words",
    [
        ("reads settings", "stopped"),
        ("imports", "stopped"),
        ("loads", "stopped while loading: nothing was written"),
    ],
)
def test_before_they_have_met_sigterm_may_tell_of_a_death(phase, words):
    """torchrun sends it to the others when it finds a process dead."""
    for size, why in (1, ""), (2, " (by torchrun, which was told to end, or has lost a process)"):
        env = {**os.environ, **as_one_of(0, size), phase: "yes"}
        command = [sys.executable, "-c", STOPPED]
        done = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
        assert (done.returncode, done.stderr) == (143, f"\n{words}{why}\n")


def member(rank, size, port, folder, work):
    """Run work(world) as a command under torchrun does, with stderr in a file.

    Processes of several machines have `work(rank)`, which joins the world itself or does not.
    """
    os.environ |= as_one_of(rank, size, MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "test"}
    if machines := work in ON_MACHINES:
        os.environ |= {"GROUP_RANK": str(rank), "GROUP_WORLD_SIZE": str(size)}
    os.environ["TORCHELASTIC_ERROR_FILE"] = str(folder / f"{rank}.json")
    file = os.open(folder / f"{rank}.txt", os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 2)
    sys.stderr = os.fdopen(2, "w")
    ending.SILENT = launch.GRACE = 0.5
    ending.NOTICED = 3.0  # these machines are slow

    def main():
        work(rank if machines else join_world("cpu"))
        leave_world()

    exit_on_user_error(main)
    assert not dist.is_initialized()
    os._exit(0)


def ended(work, folder, size=2):
    """Let processes do work(world); returns what each prints on stderr, and their statuses."""
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # torchrun's
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    arguments = [(rank, size, store.port, folder, work) for rank in range(size)]
    processes = [context.Process(target=member, args=each, daemon=True) for each in arguments]
    for process in processes:
        process.start()
    try:
        for process in processes:
            process.join(60)
        statuses = [process.exitcode for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(folder / f"{rank}.txt").read_text() for rank in range(size)], statuses


def part_in_peace(world):
    world.barrier()
    if world.is_first:
        time.sleep(1)  # longer than what ends a process that has lost another one


def user_error_on_one(world):
    if world.rank == 1:
        raise UserError("data is bad: mend it.")
    world.barrier()


def user_error_on_all(world):
    world.barrier()
    raise UserError("data is bad: mend it.")


def bug_on_the_first(world):
    if world.rank == 0:
        raise ValueError("a bug")
    world.barrier()


def killed(world):
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    world.barrier()


def killed_while_another_cannot_notice(world):
    world.barrier()
    if world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(60)  # as where it waits for a GPU


def killed_while_loading(world):
    """torchrun ends the others by SIGTERM, within a tenth of a second."""
    world.barrier()
    time.sleep(0.2)  # the others have left the barrier
    if world.rank == 2:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(0.1)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


def ended_by_the_user_while_loading(world):
    world.barrier()
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(60)


def one_machine_lacks_a_file(rank):
    if rank == 1:
        time.sleep(1)  # the other one waits for it by then
        raise UserError("config is not there: name another.")
    join_world("cpu")


def told_of_another_s_signal(world):
    signals = StopSignals()
    signals.received = signal.SIGTERM if world.rank == 1 else 0
    world.barrier()
    assert signals.is_told() == (world.rank == 1) or world.rank == 0
    world.barrier()
    assert signals.is_told()


ON_MACHINES = {one_machine_lacks_a_file}


def stopped_while_loading(world):
    world.barrier()
    with StopSignals():
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(5)


def test_processes_that_come_to_their_end_say_nothing(tmp_path):
    assert ended(part_in_peace, tmp_path) == (["", ""], [0, 0])


@pytest.mark.parametrize(
    "work, expected", [(user_error_on_one, [1, 2, 1]), (user_error_on_all, [2, 2, 2])]
)
def test_a_user_error_anywhere_is_printed_once(work, expected, tmp_path):
    errors, statuses = ended(work, tmp_path, size=3)
    sentence = "error: data is bad: mend it."
    assert "".join(errors) == sentence + "\n" and statuses == expected
    summaries = [json.loads(path.read_text()) for path in tmp_path.glob("*.json")]
    assert {summary["message"]["message"] for summary in summaries} == {sentence}


def test_a_traceback_is_printed_once_and_names_its_process(tmp_path):
    errors, statuses = ended(bug_on_the_first, tmp_path)
    assert errors[0].startswith("process 0 of 2 on ")
    assert errors[0].endswith("ValueError: a bug\n\n")
    assert errors[1] == "" and statuses == [1, 1]


def test_a_process_that_is_killed_while_the_others_load_is_told_as_that(tmp_path):
    errors, statuses = ended(killed_while_loading, tmp_path, size=3)
    assert errors[0] == errors[2] == "" and statuses[2] == -signal.SIGKILL
    assert errors[1].startswith("error: process 1 of 3 on ") and errors[1].count("\n") == 1
    assert "has lost another one, which was killed or has died (" in errors[1]

    (again := tmp_path / "again").mkdir()
    errors, statuses = ended(ended_by_the_user_while_loading, again, size=3)
    assert "".join(errors) == "\nstopped\n"


def test_a_machine_that_cannot_begin_ends_the_others(tmp_path):
    started = time.monotonic()
    errors, statuses = ended(one_machine_lacks_a_file, tmp_path)
    assert errors == ["", "error: config is not there: name another.\n"] and statuses == [1, 2]
    assert time.monotonic() - started < 60
    assert "name another" in (tmp_path / "0.json").read_text()  # which torchrun shows


def test_long_work_hears_of_another_process_s_signal(tmp_path):
    assert ended(told_of_another_s_signal, tmp_path) == (["", ""], [0, 0])


@pytest.mark.parametrize("work", [killed, killed_while_another_cannot_notice])
def test_a_killed_process_ends_the_others(work, tmp_path):
    errors, statuses = ended(work, tmp_path)
    assert statuses == [1, -signal.SIGKILL] and errors[1] == "" and errors[0].count("\n") == 1
    assert errors[0].startswith("error: process 0 of 2 on ")
    assert "has lost another one, which was killed or has died (" in errors[0]
    assert "Connection " in errors[0]


def test_a_signal_to_all_is_told_once(tmp_path):
    errors, statuses = ended(stopped_while_loading, tmp_path)
    assert "".join(errors) == "\nstopped while loading: nothing was written\n"
    assert statuses == [130, 130]


def test_the_signal_that_torchrun_passes_on_is_the_same_one(monkeypatch):
    for name, value in as_one_of(0).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(KeyboardInterrupt, match="at once"), StopSignals() as signals:
        signals.defer(lambda: "go on")
        for _ in range(2):
            os.kill(os.getpid(), signal.SIGINT)
        assert signals.received == signal.SIGINT
        signals._first -= 10
        os.kill(os.getpid(), signal.SIGINT)
