"""Timing: one statistic, calls in turn, and no host time inside a call on a GPU."""

import device_time
import pytest
import torch
from device_time import MOST_WAIT, TRIES, Seconds, Stopwatch
from measure import Case, copy_case, read_case, summary, time_alternating


def test_a_summary_has_the_median_of_device_and_host_and_counts_exposed_calls():
    calls = [Seconds(3.0, 0.3, False), Seconds(1.0, 0.1), Seconds(2.0, 0.2)]
    assert summary(calls) == {"median": 2.0, "least": 1.0, "host": 0.2, "calls": 3, "exposed": 1}
    assert summary([Seconds(1.0)])["host"] is None


def test_cases_are_called_in_turn_each_after_its_restore_and_a_failing_one_is_left_out():
    order, skipped = [], {}

    def fail():
        raise RuntimeError("no such kernel")

    cases = {
        "ours": Case(lambda: order.append("a"), lambda: order.append("restore a")),
        "theirs": Case(lambda: order.append("b")),
        "broken": Case(fail),
    }
    times = time_alternating(cases, 2, "cpu", skipped)
    assert order == ["restore a", "a", "b"] * 2
    assert {name: taken["calls"] for name, taken in times.items()} == {"ours": 2, "theirs": 2}
    assert skipped == {"broken": "RuntimeError: no such kernel"}


def test_a_failure_of_ours_is_not_excused():
    def fail():
        raise RuntimeError("wrong")

    with pytest.raises(RuntimeError, match="wrong"):
        time_alternating({"ours": Case(fail)}, 1, "cpu", {})


def test_limits_copy_and_read_what_they_are_given():
    source = torch.randn(8, 64)
    copied, _ = copy_case(source).call()
    assert copied == source[0, 0]
    read, _ = read_case(source).call()
    torch.testing.assert_close(read, source.sum())


def timed_as(monkeypatch, host: float) -> list[float]:
    """Let a GPU hide `host` seconds if it waits longer; return the waits, as they come."""
    waits = []

    def once(call, device, wait):
        waits.append(wait)
        call()
        return Seconds(1e-3, host, wait > host)

    monkeypatch.setattr(device_time, "once", once)
    return waits


def test_the_gpu_waits_longer_until_the_host_is_hidden_and_keeps_that(monkeypatch):
    waits, restored = timed_as(monkeypatch, host=0.01), []
    watch = Stopwatch("cuda")
    taken = [watch(lambda: restored.append(1), lambda: None) for _ in range(2)]
    assert all(each.hidden for each in taken)
    assert len(waits) == len(restored) == 3  # one call in vain, and restored before each
    assert waits[0] < 0.01 < waits[1] == waits[2]


def test_a_call_that_cannot_be_hidden_is_tried_a_few_times_in_all(monkeypatch):
    waits = timed_as(monkeypatch, host=MOST_WAIT)
    watch = Stopwatch("cuda")
    taken = [watch(lambda: None, lambda: None) for _ in range(3)]
    assert not any(each.hidden for each in taken)
    assert len(waits) == 3 + TRIES and max(waits) == MOST_WAIT


def test_a_call_of_seconds_is_not_made_again(monkeypatch):
    waits = timed_as(monkeypatch, host=2.0)
    assert not Stopwatch("cuda")(lambda: None, lambda: None).hidden
    assert len(waits) == 1
