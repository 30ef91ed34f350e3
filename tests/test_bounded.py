"""Calls with a bound: their results, what they raise, and what the system ends."""

import os
import signal
import time

import pytest

from mr1_fast import bounded
from mr1_fast.bounded import Refused

from .data.processes import children
from .data.scripts import run_script


@pytest.fixture(autouse=True)
def short(monkeypatch):
    monkeypatch.setattr(bounded, "CPU_SECONDS", 1)


def for_ever() -> None:
    while True:
        pass


HARMFUL = {
    "raises": (lambda: {}["key"], "KeyError: 'key'"),
    "exits": (lambda: os._exit(0), "more than 1 seconds"),
    "leaves": (lambda: exit(), "SystemExit"),
    "loops": (for_ever, "more than 1 seconds"),
    "in C": (lambda: 10 ** (10**10), "more than 1 seconds"),
    "10 GB": (lambda: "a" * 10**10, "memory"),
    "piece by piece": (lambda: [bytes(10**8) for _ in range(10**3)], "memory"),
    "aborts": (os.abort, "more than"),
    "a long reply": (lambda: "a" * (2 << 20), "more than"),
    "no JSON": (object, "more than"),
}


@pytest.mark.parametrize("work, match", HARMFUL.values(), ids=HARMFUL)
def test_what_harms_is_refused(work, match):
    with pytest.raises(Refused, match=match):
        bounded.bounded(work)


def test_results_come_back_and_effects_do_not(tmp_path, capfd):
    seen, before = [], children(os.getpid())
    assert bounded.bounded(lambda: seen.append(1) or {"a": [1, "é", None]}) == {"a": [1, "é", None]}
    bounded.bounded(lambda: os.write(1, b"said"))
    assert not seen and capfd.readouterr().out == ""
    assert set(children(os.getpid())) <= set(before)  # nothing is left behind


def test_a_call_that_sleeps_is_given_up(monkeypatch):
    monkeypatch.setattr(bounded, "WALL_SECONDS", 0.2)
    with pytest.raises(Refused, match="though little processor time"):
        bounded.bounded(lambda: time.sleep(60))


def test_a_child_waits_for_no_thread_of_its_parents_pool(tmp_path):
    """OpenMP's threads are not in a forked child, where PyTorch would wait for them for ever."""
    script = """
import torch
from mr1_fast import bounded
bounded.WALL_SECONDS = 20.0
torch.set_num_threads(4)
def total():
    return float(torch.ones(4_000_000).relu().sum())
print(total() == bounded.bounded(total), torch.get_num_threads())
"""
    done = run_script(tmp_path / "pool.py", script, OMP_NUM_THREADS="4")
    assert done.stdout.split() == ["True", "4"], done.stderr


def test_a_parent_that_ignores_the_end_of_its_children_gets_the_result(monkeypatch):
    before = signal.signal(signal.SIGCHLD, signal.SIG_IGN)
    try:
        assert bounded.bounded(lambda: 1) == 1
    finally:
        signal.signal(signal.SIGCHLD, before)


def test_a_stop_right_after_the_fork_raises_nothing_in_the_child(monkeypatch):
    """There it would go on with what the parent does."""
    parent, fork = os.getpid(), os.fork

    def stopped_fork():
        if not (child := fork()):
            os.kill(os.getpid(), signal.SIGINT)
        return child

    monkeypatch.setattr(os, "fork", stopped_fork)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        assert bounded.bounded(lambda: 1) == 1
    finally:
        if os.getpid() != parent:
            os._exit(1)
    assert signal.SIGINT not in signal.pthread_sigmask(signal.SIG_BLOCK, ())
