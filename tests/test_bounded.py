"""Calls with a bound: their results, what they raise, and what the system ends."""

import os
import time

import pytest

from mr1_fast import bounded
from mr1_fast.bounded import Refused


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
    "piece by piece": (lambda: [bytes(10**6) for _ in range(10**5)], "memory"),
    "aborts": (os.abort, "more than"),
    "a long reply": (lambda: "a" * (2 << 20), "more than"),
    "no JSON": (object, "more than"),
}


@pytest.mark.parametrize("work, match", HARMFUL.values(), ids=HARMFUL)
def test_what_harms_is_refused(work, match):
    with pytest.raises(Refused, match=match):
        bounded.bounded(work)


def test_results_come_back_and_effects_do_not(tmp_path, capfd):
    seen = []
    assert bounded.bounded(lambda: seen.append(1) or {"a": [1, "é", None]}) == {"a": [1, "é", None]}
    bounded.bounded(lambda: os.write(1, b"said"))
    assert not seen and capfd.readouterr().out == ""
    with pytest.raises(ChildProcessError):
        os.waitpid(-1, os.WNOHANG)  # nothing is left behind


def test_a_call_that_sleeps_is_given_up(monkeypatch):
    monkeypatch.setattr(bounded, "WALL_SECONDS", 0.2)
    with pytest.raises(Refused):
        bounded.bounded(lambda: time.sleep(60))
