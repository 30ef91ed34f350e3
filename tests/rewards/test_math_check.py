"""Answers that math-verify reads in an output, hostile strings, and the process behind it."""

import os
import random
import re
import signal
import threading
import time
from itertools import pairwise
from pathlib import Path

import pytest

from mr1_fast.rewards import accuracy_reward, format_reward, judge, judge_completion, math_check
from mr1_fast.rewards.answers import kind_of
from mr1_fast.rewards.math_check import math_answer, math_equal
from mr1_fast.rewards.r1v import r1v_counting, r1v_reward

from ..data.hostile import (
    endless,
    example,
    injections,
    megabytes,
    nested,
    random_strings,
)
from ..data.processes import children, is_running, only_child
from ..data.scripts import run_script

HANGS = r"\boxed{" + "(" * 4000 + "}"
"""Keeps math-verify busy for longer than anyone would wait, with reading alone."""


def test_an_output_that_is_never_read_through_has_no_answer():
    outputs = [
        "<answer> 1 </answer>",
        HANGS,
        "<answer> 2.5 </answer>",
        HANGS,
        "\ud800 is $x^2$",
        "",
        HANGS,
    ]
    start = time.perf_counter()
    assert [*map(math_answer, outputs)] == ["1", None, "2.50000000000000", None, "x**2", None, None]
    assert time.perf_counter() - start < 20
    assert math_answer(HANGS, seconds=0) is None
    assert math_equal("<answer> $\\frac{6}{2}$ </answer>", "3")


def test_nothing_is_worked_out():
    """These keep math_equal busy until its time is up."""
    outputs = ["<answer> 9**9**9**9 </answer>", "$9^{9^{9^{9}}}$", "$(10^9)!$", "$2^{2^{40}}$"]
    answers = ["9**(9**(9**9))", "9**(9**(9**9))", "factorial(10**9)", "2**(2**40)"]
    assert [math_answer(output, seconds=20) for output in outputs] == answers


def test_what_cannot_be_parsed_comes_as_plain_text():
    outputs = ["$(a last$", '$(" last\ud800$', "$(é last\u2028x$", "\\boxed{(a\nlast}"]
    assert [*map(math_answer, outputs)] == ["(a last", "( last\ud800", "(é last\u2028x", "(a last"]


def test_where_nothing_is_found_there_is_no_answer():
    assert [
        math_answer(text) for text in ("", "no idea", "null", "\\boxed{}", "<answer></answer>")
    ] == [None] * 5
    assert math_answer("<answer> 3/1 </answer>" + " so" * 3000) is None  # only the end is read


def test_a_text_of_more_than_8192_characters_is_no_answer():
    matrix = "$\\begin{pmatrix}1.1" + "&1.1" * 400 + "\\end{pmatrix}$"
    assert (
        len(math_answer(matrix, seconds=20))
        == len("Matrix([[]])") + 401 * len("1.10000000000000, ") - 2
    )
    assert math_answer(matrix.replace("&", "&1.1&"), seconds=20) is None


@pytest.mark.slow
def test_ten_thousand_hostile_strings(tmp_path):
    """Nothing raises, takes more than 2 s or is executed, and a right answer is still found."""
    marker, item = tmp_path / "executed", example("3")
    special = [*injections(marker), *nested(), *endless(), *megabytes()]
    strings = [*random_strings(10_000 - len(special), random.Random(11)), *special]
    assert math_equal("<answer> 3 </answer>", "3")  # the worker has started
    calls = {
        "format": lambda text: format_reward(text, item),
        "accuracy": lambda text: accuracy_reward(text, item),
        "judge": lambda text: judge(text, "2√3 cm").right,
        "judge's solution": lambda text: judge("3 or 4", text[:1000]).right,
        "judge of itself": lambda text: judge(text[:1000], text[-1000:]).right,
        "judge_completion": lambda text: judge_completion(text, "3x + 2", untagged=True).right,
        "kind_of": lambda text: len(kind_of(text)) < 20,
        "r1v_counting": lambda text: r1v_counting(text, "3").right,
        "math_equal": lambda text: math_equal(text, "3", seconds=0.3),
        "math_answer": lambda text: len(math_answer(text, seconds=0.3) or "") <= 8192 or "too long",
    }
    for at, text in enumerate(strings):
        for name, call in calls.items():
            if name == "math_answer" and at < 8000:  # math_equal has had it read
                continue
            start = time.monotonic()
            assert call(text) in (0.0, 1.0)
            assert time.monotonic() - start < 2.0, (name, text[:80], len(text))
    assert math_equal("<answer> 3 </answer>", "3")
    assert not marker.exists()


def test_a_hanging_string_does_not_lose_the_next_answer():
    for text in endless()[:2]:
        start = time.monotonic()
        assert not math_equal(text, "3", seconds=0.2)
        assert time.monotonic() - start < 5.0
        assert math_equal("<answer> $\\frac{6}{2}$ </answer>", "3")
        assert not math_equal("<answer> $\\frac{6}{2}$ </answer>", "4")


def test_a_killed_child_or_zygote_is_replaced():
    assert math_equal("1/2", "0.5", seconds=0.3)
    zygote = math_check._client.worker.process.pid
    (child,) = children(zygote)
    time.sleep(0.4)  # the timer is off between requests
    assert re.search(
        r"Max address space +2147483648 +2147483648 ", Path(f"/proc/{child}/limits").read_text()
    )
    os.kill(child, signal.SIGSEGV)
    assert math_equal("1/2", "0.5")
    assert math_check._client.worker.process.pid == zygote
    assert children(zygote) not in ([], [child])
    os.kill(*children(zygote), signal.SIGSEGV)
    assert math_answer("1/2") == "1/2"
    assert math_check._client.worker.process.pid == zygote
    os.kill(zygote, signal.SIGKILL)
    assert math_equal("1/2", "0.5")
    assert math_check._client.worker.process.pid != zygote
    os.kill(math_check._client.worker.process.pid, signal.SIGKILL)
    assert math_answer("1/2") == "1/2"


KILLS = int(os.environ.get("MR1_FAST_KILLS", "4"))
"""How often each process behind an answer is killed, and how often it is stopped."""


def test_a_worker_that_is_killed_or_stopped_at_any_moment_costs_one_answer(monkeypatch):
    """The zygote and its child, at random moments, while answers are read one after the other."""
    monkeypatch.setattr(math_check, "GRACE_SECONDS", 0.5)
    right = "<answer> $\\frac{6}{2}$ </answer>"
    assert math_equal(right, "3")
    draw = random.Random(5)
    for number, times in ((signal.SIGKILL, KILLS), (signal.SIGSTOP, 1 + KILLS // 10)):
        for who in (0, 1) * times:
            zygote = math_check._client.worker.process.pid
            victim = [zygote, only_child(zygote)][who]
            timer = threading.Timer(draw.random() * 0.02, os.kill, (victim, number))
            timer.start()
            verdicts = []
            while timer.is_alive() or len(verdicts) < 3:
                verdicts.append(math_equal(right, "3", seconds=1.0))
            while is_running(victim):  # one that is stopped, or dies at this moment
                verdicts.append(math_equal(right, "3", seconds=1.0))
            assert verdicts.count(False) <= 1, (number, who)
            assert math_equal(right, "3")
    worker = math_check._client.worker.process.pid
    assert [is_running(each) for each in (worker, only_child(worker))] == [True, True]


def test_many_trainers_at_once_have_a_worker_each(tmp_path):
    script = """
import os
from mr1_fast.rewards.math_check import math_equal
def is_right():
    found = [math_equal(f"<answer> {n}/2 </answer>", "1.5") for n in range(6)]
    return found == [n == 3 for n in range(6)]
pids = []
for _ in range(6):
    pid = os.fork()
    if pid == 0:
        os._exit(0 if is_right() else 1)
    pids.append(pid)
print([os.waitpid(pid, 0)[1] for pid in pids])
"""
    assert run_script(tmp_path / "trainers.py", script).stdout == f"{[0] * 6}\n"


def test_the_slow_answers_of_a_step_together_take_bounded_time(monkeypatch):
    """Ordinary ones do not count, and are read after any number of slow ones."""
    monkeypatch.setattr(math_check, "QUICK_SECONDS", 0.2)  # a machine may hold one up by more
    right = "<answer> $\\frac{6}{2}$ </answer>"

    def left_after(_):
        assert any(math_check.math_verdict(right, "3") for _ in range(3))
        return math_check._client.left

    assert math_equal(right, "3")
    started = time.monotonic()
    with math_check.time_of_a_step(2.0):
        for _ in range(3):
            assert {math_check.math_verdict(HANGS, "3") for _ in range(5)} == {None}
            left_after(0)
        assert 0 < math_check._client.left < 1.5
        left = [math_check._client.left, *map(left_after, range(50))]
        assert sum(a == b for a, b in pairwise(left)) > 40
    assert time.monotonic() - started < 2.0 + 18 * 0.2 + 10
    assert math_equal(right, "3")


def test_threads_share_the_worker():
    verdicts, answers = {}, {}

    def ask(k: int) -> None:
        verdicts[k] = [r1v_reward(f"<answer> {n}/1 </answer>", str(k)).right for n in range(8)]

    def read(k: int) -> None:
        answers[k] = [math_answer(f"<answer> {n} </answer>") for n in range(k, k + 8)]

    threads = [threading.Thread(target=act, args=(k,)) for k in range(8) for act in (ask, read)]
    for act in (threading.Thread.start, threading.Thread.join):
        for thread in threads:
            act(thread)
    assert verdicts == {k: [n == k for n in range(8)] for k in range(8)}
    assert answers == {k: [str(n) for n in range(k, k + 8)] for k in range(8)}


@pytest.mark.parametrize("end", ["", "os.kill(os.getpid(), signal.SIGKILL)"])
def test_a_plain_script_without_main_guard_scores_and_leaves_no_process(tmp_path, end):
    """Also after a fork, as in a DataLoader worker: parent and child must not share the pipes."""
    script = f"""
import os, signal
from mr1_fast.rewards.math_check import _client, math_equal
def right(k):
    return all(math_equal(f"<answer> {{n}} </answer>", str(k)) == (n == k) for n in range(50))
first = right(2)
pid = os.fork()
if pid == 0:
    os._exit(0 if right(3) else 1)
zygote = _client.worker.process.pid
print(first, right(4), os.waitpid(pid, 0)[1], zygote, flush=True)
print(open(f"/proc/{{zygote}}/task/{{zygote}}/children").read(), flush=True)
{end}
"""
    words = (done := run_script(tmp_path / "plain.py", script)).stdout.split()
    assert (words[:3], done.stderr, len(words)) == (["True", "True", "0"], "", 5)
    deadline = time.monotonic() + 5
    while any(map(is_running, words[3:])):
        assert time.monotonic() < deadline
        time.sleep(0.02)


def test_missing_math_verify_is_one_clear_error(tmp_path):
    (tmp_path / "math_verify.py").write_text("raise ImportError('not installed here')")
    script = "from mr1_fast.errors import exit_on_user_error\n"
    script += "from mr1_fast.rewards.math_check import math_equal\n"
    script += "exit_on_user_error(lambda: math_equal('1', '1'))"
    done = run_script(tmp_path / "script.py", script, PYTHONPATH=str(tmp_path))
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert re.search("not installed here.*pip install math-verify", done.stderr)


def test_an_interrupted_question_does_not_leave_its_reply_to_the_next():
    """Ctrl-C in a notebook, where the process goes on."""
    assert math_equal("<answer> 3 </answer>", "3")
    before = signal.signal(signal.SIGALRM, signal.default_int_handler)
    try:
        signal.setitimer(signal.ITIMER_REAL, 0.05)
        with pytest.raises(KeyboardInterrupt):
            math_equal(endless()[0], "3", seconds=1.0)
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)
    assert [math_equal("<answer> 3 </answer>", str(n)) for n in (2, 3, 4)] == [False, True, False]
