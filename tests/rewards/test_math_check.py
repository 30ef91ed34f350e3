"""The answer that math-verify reads in an output: what it may be, and the worker with replies that are text."""

import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from mr1_fast.rewards.math_check import math_answer, math_equal

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


@pytest.mark.parametrize(("peak_kib", "forks"), [("math_worker.PEAK_KIB", 1), (0, 7)])
def test_a_child_is_replaced_once_it_has_grown_and_not_for_what_it_says(peak_kib, forks):
    requests = [
        ["$(a last b$", None, 20],
        ["$(last$", None, 20],
        ["3", "3", 20],
        ["3", "4", 20],
        ["4", None, 20],
    ]
    script = f"""
import os
import math_worker
math_worker.PEAK_KIB = {peak_kib}
forks, stdout = [], os.dup(1)
os.register_at_fork(after_in_parent=lambda: forks.append(1))
math_worker.main()
os.write(stdout, str(len(forks)).encode())
"""
    text = "".join(json.dumps(request) + "\n" for request in [*requests, ["", None, 20]])
    folder = Path(__file__).parents[2] / "mr1_fast" / "rewards"
    done = subprocess.run(
        [sys.executable, "-c", script], input=text, cwd=folder, stdout=subprocess.PIPE, text=True
    )
    assert done.stdout.split("\n") == [
        '"ready"',
        '"(a last b"',
        '"(last"',
        "true",
        "false",
        '"4"',
        "null",
        str(forks),
    ]
