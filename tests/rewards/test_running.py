"""Reward functions run at the same time, end in time or with a sentence, and name the row."""

import asyncio
import random
import re
import subprocess
import sys
import threading
import time

import pytest

from mr1_fast.errors import UserError
from mr1_fast.rewards import reward, score

from .conftest import row

ROWS = [row(1), row(2)]
HANG = 60.0
"""Seconds that a hanging function would take: far more than any limit of these tests."""


@pytest.fixture
def released():
    """An event on which hanging functions wait; it is set when the test ends."""
    event = threading.Event()
    yield event
    event.set()


def test_functions_run_at_the_same_time(registry):
    """Each waits until all are running, so that one after the other would never end."""
    together = threading.Barrier(4)

    def meet():
        together.wait(HANG)
        return 1.0

    async def meet_async(completions):
        await asyncio.to_thread(together.wait, HANG)
        return [1.0] * len(completions)

    reward("ours")(lambda completion, example: meet())
    reward("trl")(lambda completions, **columns: [meet()] * len(completions))
    reward("async")(meet_async)

    @reward("async too")
    async def other(completion, example):
        await asyncio.to_thread(together.wait, HANG)
        return 1.0

    names = ["trl", "ours", "async too", "async"]
    scores = score(["a"], [row(1)], dict.fromkeys(names, 1.0), seconds=HANG)
    assert list(scores.parts) == names and scores.total.tolist() == [[4.0]]


def test_completions_of_an_async_function_are_awaited_together(registry):
    started = []

    @reward("async")
    async def wait_for_all(completion, example):
        started.append(completion)
        while len(started) < 4:
            await asyncio.sleep(0)
        await asyncio.sleep(random.random() / 100)  # they end in any order
        return float(completion)

    scores = score(list("1234"), ROWS, {"async": 1.0}, seconds=HANG)
    assert scores.parts == {"async": [1.0, 2.0, 3.0, 4.0]}


def test_an_async_function_has_the_same_loop_in_every_step(registry):
    loops = []

    @reward("async")
    async def note_loop(completions):
        loops.append(asyncio.get_running_loop())
        return [0.0] * len(completions)

    for _ in range(2):
        score(["a"], [row(1)], {"async": 1.0})
    assert loops[0] is loops[1]


def hangs(completion):
    return completion == "hang"


def sync_ours(released):
    return lambda completion, example: float(hangs(completion) and released.wait(HANG))


def sync_trl(released):
    return lambda completions, **columns: [float(released.wait(HANG))] * len(completions)


def async_ours(released):
    async def wait(completion, example):
        if hangs(completion):
            await asyncio.sleep(HANG)
        return 0.0

    return wait


def async_trl(released):
    async def wait(completions):
        await asyncio.sleep(HANG)

    return wait


def blocks_the_loop(released):
    async def wait(completion, example):
        return float(hangs(completion) and released.wait(HANG))

    return wait


def hangs_in_a_thread(released):
    async def wait(completions):
        return [float(await asyncio.to_thread(released.wait, HANG))] * len(completions)

    return wait


SLOW = {
    sync_ours: "at row 2 of data.jsonl",
    sync_trl: "at row 1 of data.jsonl, row 2 of data.jsonl",
    async_ours: "at row 2 of data.jsonl",
    async_trl: "at row 1 of data.jsonl, row 2 of data.jsonl",
    blocks_the_loop: "at row 2 of data.jsonl",
    hangs_in_a_thread: "at row 1 of data.jsonl, row 2 of data.jsonl",
}


@pytest.mark.parametrize("make", SLOW, ids=lambda make: make.__name__)
def test_one_that_hangs_is_named_with_its_row_and_the_way_out(registry, released, make):
    reward("slow")(make(released))
    reward("quick")(lambda completion, example: 1.0)
    started = time.monotonic()
    with pytest.raises(UserError) as raised:
        score(["a", "b", "c", "hang"], ROWS, {"quick": 1.0, "slow": 1.0}, seconds=1.5)
    assert time.monotonic() - started < HANG / 2
    message = str(raised.value)
    assert re.search(rf"'slow' \(function .*{make.__name__}.*had not ended after 1.5 sec", message)
    assert SLOW[make] in message and message.endswith("make it faster, or raise --reward-seconds.")
    assert "'quick'" not in message

    # what hangs does not hold up the functions of a later step
    registry.pop("slow")
    reward("slow")(async_ours(released))
    assert score(["a", "b"], ROWS, {"slow": 1.0}, seconds=HANG).total.tolist() == [[0.0], [0.0]]


def test_rows_are_counted_where_many_are_at_work(registry, released):
    reward("slow")(sync_trl(released))
    rows = [row(i) for i in range(5)]
    with pytest.raises(
        UserError, match=r"row 0 of .*, row 1 of .*, row 2 of data.jsonl and 2 more"
    ):
        score(["a"] * 10, rows, {"slow": 1.0}, seconds=0.2)


def test_the_limit_may_be_infinite(registry):
    reward("quick")(lambda completion, example: 1.0)
    assert score(["a"], [row(1)], {"quick": 1.0}, seconds=float("inf")).total.item() == 1.0


@pytest.mark.parametrize("form", ["sync", "async"])
def test_a_batched_function_that_raises_names_the_row(registry, form):
    calls = []

    @reward("sync")
    def fails(completions, level, **columns):
        calls.append(completions)
        return [1 / each for each in level]

    @reward("async")
    async def fails_async(completions, level):
        await asyncio.sleep(0)
        return fails(completions, level)

    rows = [row(1, level=1), row(2, level=0), row(3, level=2)]
    with pytest.raises(UserError) as raised:
        score(list("abcdef"), rows, {form: 1.0})
    assert "raised ZeroDivisionError: division by zero at row 2 of data.jsonl:" in str(raised.value)
    assert isinstance(raised.value.__cause__, ZeroDivisionError)  # its traceback is kept
    assert calls == [list("abcdef"), list("ab"), list("cd")]


FAULTS = {
    "fails together alone": (lambda texts: 1 / (len(texts) < 4), "ZeroDivisionError.*row 1.*row 2"),
    "fails otherwise alone": (lambda texts: texts[4], "list index out of range.* row 1 "),
    "ends the program": (lambda texts: sys.exit("enough"), "raised SystemExit: enough at row 1 "),
    "fails while it is read": (lambda texts: (1 / (t != "d") for t in texts), "ZeroDiv.* row 2 of"),
    "has lines": (lambda texts: {}["a\nb"], r"raised KeyError: 'a\\nb' at row 1"),
    "speaks at length": (lambda texts: int("x\n" * 999), "raised ValueError: .{200,400}row 1 of"),
}


@pytest.mark.parametrize("function, message", FAULTS.values(), ids=FAULTS)
def test_whatever_a_batched_function_raises_becomes_one_sentence(registry, function, message):
    reward("odd")(lambda completions, **columns: function(completions))
    with pytest.raises(UserError, match=message) as raised:
        score(list("abcd"), ROWS, {"odd": 1.0})
    assert "\n" not in str(raised.value) and "correct the function or the row." in str(raised.value)


def test_a_failure_is_told_at_once_and_not_when_the_others_end(registry, released):
    reward("slow")(sync_trl(released))
    reward("odd")(lambda completion, example: 1 / 0)
    with pytest.raises(UserError, match=r"'odd'.* ZeroDivisionError.* at row 1 of data.jsonl"):
        score(["a", "b"], ROWS, {"slow": 1.0, "odd": 1.0}, seconds=HANG)
    assert not released.is_set()


def test_a_failure_is_told_though_the_search_for_its_row_does_not_end(registry, released):
    @reward("odd")
    def odd(completions, **columns):
        if len(completions) < 4:
            released.wait(HANG)
        raise RuntimeError("the judge is gone")

    with pytest.raises(
        UserError, match=r"the judge is gone at row 1 .*, row 2 of data.jsonl: corr"
    ):
        score(list("abcd"), ROWS, {"odd": 1.0}, seconds=1.0)


def test_a_cancelled_await_is_a_failure(registry):
    @reward("odd")
    async def odd(completion, example):
        raise asyncio.CancelledError("the client closed")

    with pytest.raises(UserError, match="raised CancelledError: the client closed at row 1 of"):
        score(["a"], [row(1)], {"odd": 1.0}, seconds=HANG)


def test_an_error_meant_for_the_user_is_left_as_it_is(registry):
    @reward("mine")
    def mine(completion, example):
        raise UserError("Start the judge first.")

    with pytest.raises(UserError, match=r"^Start the judge first\.$"):
        score(["a"], [row(1)], {"mine": 1.0})


PROGRAM = """
import asyncio, sys, threading, time
from mr1_fast.errors import UserError
from mr1_fast.rewards import reward, score
from mr1_fast.types import Example

async def in_loop(completions):
    await asyncio.sleep(1000)
async def blocking(completions):
    time.sleep(1000)
async def in_thread(completions):
    await asyncio.to_thread(time.sleep, 1000)
def in_function(completion, example):
    time.sleep(1000)

reward("slow")(globals()[sys.argv[1]])
try:
    score(["a"], [Example("", (), "3")], {"slow": 1.0}, seconds=0.2)
except UserError as error:
    sys.exit(f"told: {error}")
"""


@pytest.mark.parametrize("name", ["in_loop", "blocking", "in_thread", "in_function"])
def test_a_function_that_hangs_does_not_keep_the_process(name):
    ended = subprocess.run(
        [sys.executable, "-c", PROGRAM, name], capture_output=True, text=True, timeout=200
    )
    lines = ended.stderr.strip().splitlines()
    assert ended.returncode == 1 and len(lines) == 1, ended.stderr
    assert lines[0].startswith("told: The reward 'slow'")
