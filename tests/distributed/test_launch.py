"""Processes under torchrun: they meet, fit together, and end with one sentence; whole commands."""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import contextmanager
from datetime import timedelta
from pathlib import Path
from unittest.mock import patch

import pytest
import torch
import torch.distributed as dist

from mr1_fast.distributed import launch
from mr1_fast.distributed.launch import meet, require_same, require_shared
from mr1_fast.errors import UserError
from mr1_fast.model.device import own_device
from mr1_fast.resuming import saved_steps
from mr1_fast.stopping import StopSignals
from tests.data.gang import as_one_of, free_port, gang
from tests.data.runs import metrics, run

ROOT = Path(__file__).parents[2]


# --- before torch is imported -------------------------------------------------------------------


def command(rank, module, *argv):
    return subprocess.Popen(
        [sys.executable, "-m", f"mr1_fast.{module}", *argv],
        env={**os.environ, **as_one_of(rank)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_wrong_setting_is_told_by_the_first_process_alone():
    first, other = (command(rank, "train", "--temperatur", "1") for rank in (0, 1))
    assert first.wait(60) == 2
    expected = "error: unrecognized arguments: --temperatur 1: see python -m mr1_fast.train --help."
    assert first.communicate() == ("", expected + "\n")

    time.sleep(3)
    assert other.poll() is None  # torchrun would end the first one, before it has said why
    other.terminate()
    assert other.communicate(timeout=60) == ("", "")


@pytest.mark.parametrize("module", ["train", "plan", "merge", "report", "push"])
def test_help_is_printed_once_and_commands_with_nothing_to_share_leave_it_to_the_first(module):
    first, other = (command(rank, module, "--help") for rank in (0, 1))
    assert first.communicate(timeout=60)[0].startswith("usage: ") and first.returncode == 0
    assert other.communicate(timeout=60) == ("", "") and other.returncode == 0


# --- who has which GPU --------------------------------------------------------------------------


def test_each_process_has_the_gpu_of_its_number(monkeypatch):
    for name, value in as_one_of(1, 4, LOCAL_WORLD_SIZE=2).items():
        monkeypatch.setenv(name, value)
    assert own_device("cuda", gpus=2) == "cuda:1" and own_device("cpu", gpus=2) == "cpu"
    with pytest.raises(UserError, match="device is cuda:1, but there are 4 processes"):
        own_device("cuda:1", gpus=2)
    with pytest.raises(UserError, match=r"2 processes on .* which has 1 GPU: lower --nproc-per-n"):
        own_device("cuda", gpus=1)


# --- the processes meet -------------------------------------------------------------------------


def test_a_new_start_meets_although_the_store_has_the_words_of_an_earlier_one():
    store, met = dist.HashStore(), {}

    def start(rank):
        met[rank] = meet(store, rank, 2)

    for number in range(3):
        threads = [threading.Thread(target=start, args=[rank]) for rank in (1, 0)]
        for thread in threads:
            thread.start()
            time.sleep(0.2)  # the other one sees the word of the earlier start, and no new one
        for thread in threads:
            thread.join()
        assert not met[1].check(["number"])
        met[0].set("number", str(number))
        assert met[1].get("number") == str(number).encode()


def connected(world):
    with patch.object(launch.Sharding, "bucket", 64):
        launch.connect(torch.device("cpu"))
    return True


def test_the_calls_that_connect_cards_are_those_of_torch():
    """Of NCCL only that they fit together can be tested here."""
    assert all(gang(3, connected))


def test_a_process_that_does_not_come_is_named(monkeypatch):
    monkeypatch.setattr(launch, "MEETING", timedelta(seconds=0.6))
    monkeypatch.setattr(launch, "LONGER", 0.6)
    with pytest.raises(UserError, match=r"process 1 has not begun within .* minutes: look"):
        meet(dist.HashStore(), 0, 2)
    with pytest.raises(UserError, match="process 0 has not begun"):
        meet(dist.HashStore(), 1, 2)


def told(work):
    try:
        return work()
    except UserError as error:
        return str(error)


def look_at_one_another(world, folder):
    launch.SEEN = 0.2
    mine = folder / str(world.rank)
    mine.mkdir()
    signals = StopSignals()
    signals.received = signal.SIGTERM if world.rank == 1 else 0
    return (
        told(lambda: require_same(world, {"seed": 1}, "X")),
        told(lambda: require_same(world, {"seed": world.rank}, "take one seed")),
        told(lambda: require_shared(world, folder)),
        told(lambda: require_shared(world, mine)),
        signals.agree(world.most),
        sorted(path.name for path in folder.iterdir()),
    )


def test_processes_that_do_not_fit_together_are_told_alike(tmp_path):
    first, other = gang(2, look_at_one_another, tmp_path)
    assert first[0] is None and first[1].startswith("seed is 0 in process 0 on ")
    assert "but 1 in process 1 on" in first[1] and first[1].endswith(": take one seed.")
    assert first[2] is None and first[3].startswith(f"output {tmp_path}/0 is not shared: process 1")
    assert other[3].startswith(f"output {tmp_path}/1 is not shared: process 1")
    assert first[:3] == other[:3] and first[4] == other[4] == signal.SIGTERM
    assert first[5] == ["0", "1"]


# --- torchrun itself ----------------------------------------------------------------------------

KILLED_ONCE = """
import os, signal
from mr1_fast.rewards import reward

calls = []

@reward("letters")
def letters(completion, example):
    calls.append(completion)
    restarts = os.environ.get("TORCHELASTIC_RESTART_COUNT", "1")
    if os.environ.get("RANK") == "1" and restarts == "0" and len(calls) == KILLED_AT:
        os.kill(os.getpid(), signal.SIGKILL)
    return sum(map(str.isalpha, completion)) / (1 + len(completion))
"""


@contextmanager
def started(*argv, processes=1, nodes=("--standalone",)):
    """Start agents of torchrun, each as a terminal does, with `nodes` as their arguments."""
    agent = [sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={processes}"]
    agents = [
        subprocess.Popen(
            [*agent, *node.split(), "-m", "mr1_fast.train", *map(str, argv)],
            env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
        )
        for node in nodes
    ]
    try:
        yield agents
    finally:
        for each in agents:
            if each.poll() is None:
                os.killpg(each.pid, signal.SIGKILL)
            each.wait()


@pytest.mark.slow
def test_two_machines_of_which_one_process_is_killed_give_the_numbers_of_one(run_args, tmp_path):
    """torchrun starts both again, and they go on from the checkpoint of the first step."""
    (plugin := tmp_path / "reward.py").write_text(KILLED_ONCE.replace("KILLED_AT", "4"))
    settings = dict(eval_samples=0, save_every=1)
    run(run_args(tmp_path / "one", **settings))

    node = f"--nnodes=2 --rdzv-backend=c10d --rdzv-endpoint=127.0.0.1:{free_port()}"
    argv = [*run_args(tmp_path / "two", plugin=plugin, **settings), "--resume=auto"]
    with started(*argv, nodes=[f"{node} --max-restarts=1"] * 2) as agents:
        output = [agent.communicate(timeout=500)[0] for agent in agents]
    assert [agent.returncode for agent in agents] == [0, 0], output
    assert sum(text.count("has lost another one") for text in output) == 1
    assert sum(text.count("the first prompt") for text in output) == 2  # two starts
    for ours, alone in zip(metrics(tmp_path / "two"), metrics(tmp_path / "one"), strict=True):
        assert ours == pytest.approx(alone, rel=1e-5, abs=1e-7)
    completions = [(tmp_path / name / "completions.jsonl").read_text() for name in ("one", "two")]
    assert completions[0] == completions[1]


@pytest.mark.slow
def test_ctrl_c_in_the_terminal_of_torchrun_saves_once_and_says_how_to_go_on(run_args, tmp_path):
    argv = run_args(folder := tmp_path / "run", steps=5000, eval_samples=0, save_every=0)
    with started(*argv, processes=2) as (agent,):
        deadline = time.monotonic() + 300
        while not (folder / "metrics.jsonl").exists():
            assert agent.poll() is None and time.monotonic() < deadline
            time.sleep(0.1)
        os.killpg(agent.pid, signal.SIGINT)
        output = agent.communicate(timeout=100)[0]
    (step,) = saved_steps(folder / "checkpoints")
    way_on = f"go on with `torchrun … -m mr1_fast.train --resume {folder}`"
    assert output.count(f"stopped after {step} of 5000 steps: {way_on}") == 1
    assert output.count("stopping: what has begun is finished and saved") == 1
    assert output.count("torchrun kills what is not done after 30 s") == 1
    assert agent.returncode != 0
