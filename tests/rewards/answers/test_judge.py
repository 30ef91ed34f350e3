"""The strict judge: what it takes for the same, what never, and properties over many solutions."""

import json
import random
import re
import time
from itertools import pairwise
from pathlib import Path

import pytest

from mr1_fast.rewards import judge
from mr1_fast.rewards.answers import MAX_CHARS, kind_of

from .pairs import RIGHT
from .solutions import DATA, SOLUTIONS
from .wrong_pairs import WRONG


@pytest.mark.parametrize("kind", RIGHT)
def test_the_same_written_differently_is_right_in_either_direction(kind):
    for answer, solution in RIGHT[kind]:
        for pair in ((answer, solution), (solution, answer)):
            verdict = judge(*pair)
            assert verdict.right, (*pair, verdict.why)
            assert verdict.why.startswith("the same ")


@pytest.mark.parametrize("kind", WRONG)
def test_what_only_looks_alike_is_wrong_in_either_direction(kind):
    for answer, solution in WRONG[kind]:
        for pair in ((answer, solution), (solution, answer)):
            assert not judge(*pair).right, pair


def published_solutions() -> list[str]:
    """All solutions of both test sets where they are here, otherwise one of every form."""
    solutions = set(SOLUTIONS)
    for path in sorted(DATA.glob("*outputs.json")):
        solutions |= {str(r["ground_truth"]) for r in json.loads(path.read_text())["results"]}
    return sorted(solutions)


def test_every_published_solution_is_a_number_and_equals_itself():
    solutions = published_solutions()
    assert len(solutions) > 100
    for solution in solutions:
        assert judge(solution, solution).right
        assert kind_of(solution) == "number", solution


REWRITINGS = [
    lambda text: f" {text} ",
    lambda text: f"\n    {text}\n    ",
    lambda text: f"${text}$",
    lambda text: f"\\({text}\\)",
    lambda text: f"\\boxed{{{text}}}",
    lambda text: f"**{text}**",
    lambda text: f"{text}.",
    lambda text: f"{text}。",
    lambda text: f"The answer is {text}",
    lambda text: f"Answer: {text}.",
    lambda text: f"x = {text}",
    lambda text: f"= {text}",
    lambda text: re.sub(r"√\{", r"\\sqrt{", text),
    lambda text: re.sub(r"√\{(\d+)\}", r"√\1", text),
    lambda text: re.sub(r"√\{(\d+)\}", r"sqrt(\1)", text),
    lambda text: re.sub(r"\{(.)", r"{ \1", text),
    lambda text: text.replace("\\frac", "\\dfrac"),
    lambda text: re.sub(r"\\frac\{(\d+)\}\{(\d+)\}", r"\1/\2", text),
    lambda text: text.replace("π", "\\pi "),
    lambda text: text.replace("°", "^\\circ").replace("cm", "\\text{ cm}"),
    lambda text: re.sub("(?<!平方)(?<!厘)米", " m", text.replace("°", " degrees")),
    lambda text: text.replace("cm^{2}", "cm²").replace("cm²", "㎠"),
    lambda text: re.sub(r"\d", lambda digit: chr(ord(digit[0]) + 0xFEE0), text),
    lambda text: re.sub(r"(√\{\d+\})-", "\\1\u2212", text),
]


def test_rewriting_a_solution_changes_no_verdict():
    rng = random.Random(1)
    for solution in published_solutions():
        for rewrite in REWRITINGS:
            written = rewrite(solution)
            assert judge(written, solution).right, (written, solution)
            other = rng.choice(SOLUTIONS)
            assert judge(written, other).right == judge(solution, other).right, (written, other)
        both = rng.choice(REWRITINGS[:5])(rng.choice(REWRITINGS[5:])(solution))
        assert judge(solution, solution).right == judge(solution, both).right, both


def number_of(solution: str) -> str:
    """Return a published solution without its unit."""
    return re.sub(r"(?:°|[a-z]+(?:\^\{2\}|\^2\^|²)?|[\u4e00-\u9fff]+)$", "", solution)


def other_answers(solution: str) -> list[str]:
    """Answers that are near a solution and wrong."""
    number = number_of(solution)
    unit = solution[len(number) :]
    answers = [f"-{solution}", f"{solution} or 999", f"{solution}, 999", f"not {solution}"]
    answers += [
        f"{number}:7",
        f"{number}+1{unit}",
        f"({number})·10^2{unit}",
        f"{number}√{{2}}{unit}",
    ]
    answers += [f"{number}π{unit}", f"{number}x{unit}", f"{number} apples", f"({number}, 7)"]
    answers += [f"x > {solution}", f"B. {solution} or C", f"{solution} {solution}"]
    answers += [f"2^{{{number}}}+{number}", f"({number})^{{77}}" if number not in "01" else "7"]
    if "√" in solution:
        answers += [re.sub(r"√\{\d+\}", "√{97}", solution), re.sub(r"√\{(\d+)\}", r"\1", solution)]
        answers += [re.sub(r"√\{\d+\}", "", solution) or "1", re.sub(r"√", "", solution)]
    if "π" in number and number != "π":
        answers += [solution.replace("π", ""), solution.replace("π", "²")]
    if unit:
        answers += [f"{number} kg", f"{number} km", f"{number} min", f"{number} {unit}/s"]
    return answers


def test_near_answers_are_never_right():
    count = 0
    for solution in published_solutions():
        if solution == "0":
            continue  # -0 is 0
        for answer in other_answers(solution):
            count += 1
            assert not judge(answer, solution).right, (answer, solution)
            assert not judge(solution, answer).right, (answer, solution)
    assert count > 1500


def test_verdicts_are_symmetric_over_random_texts():
    rng = random.Random(2)
    parts = [
        part for pairs in (*RIGHT.values(), *WRONG.values()) for pair in pairs for part in pair
    ]
    joints = ("", " ", ", ", " or ", "=", ":", "+", "^")
    texts = [rng.choice(parts) + rng.choice(joints) + rng.choice(parts) for _ in range(600)]
    for a, b in pairwise(texts):
        assert judge(a, b).right == judge(b, a).right, (a, b)
        assert judge(a, a).right == bool(a.strip()) or not judge(a, "x").right
    for a in texts:
        assert judge(a, f" {a} ").right == judge(a, a).right


def test_different_solutions_are_right_for_each_other_only_by_value_and_unit():
    """Two solutions that differ are the same only if one leaves the unit out, or by value."""
    by_value = set()
    for i, a in enumerate(SOLUTIONS):
        for b in SOLUTIONS[:i]:
            unit_is_left_out = number_of(a) == number_of(b) and number_of(a) in (a, b)
            if judge(a, b).right and not unit_is_left_out:
                by_value.add(frozenset((a, b)))
            assert judge(a, b).right or not unit_is_left_out
    assert by_value == {
        frozenset(("2.4", r"\frac{12}{5}")),
        frozenset(("6", "6.00米")),
        frozenset((r"\frac{2√{5}}{5}", r"\frac{2}{5}√{5}")),
    }


@pytest.mark.parametrize(
    ("answer", "solution", "why"),
    [
        ("5√2", "5√3", "5√2 is not 5√3"),
        ("12 km", "12 m", "12 km is not 12 m"),
        ("$3$", "3.0", "the same number"),
        ("3", "3", "the same text"),
        ("", "3", "the answer is empty"),
        ("3", "$$", "the solution is empty"),
        ("1728", "1331 and 1728", "one answer where the solution has 2 answers"),
        ("3 or 4 or 5", "3 or 4", "3 answers where the solution has 2 answers"),
        (
            "3 apples",
            "3",
            "“3 apples” was not understood as a whole, and is not the solution's text",
        ),
        ("3", "3 apples", "“3” is not the solution's text “3 apples”"),
        ("1" * MAX_CHARS + "1", "1", "the answer is longer than 1,000 characters"),
        ("b\x1b[31m\ud800" + "c" * 99, "7", "“b [31m�" + "c" * 52 + "…” was not understood as a "
         "whole, and is not the solution's text"),
    ],
)  # fmt: skip
def test_the_reason_is_one_printable_clause(answer, solution, why):
    assert judge(answer, solution).why == why


def test_the_table_of_the_documentation_is_what_the_judge_does():
    """In each group of examples the first is the same as all others, or as none."""
    lines = (Path(__file__).parents[3] / "docs" / "judge.md").read_text().splitlines()
    rows = [line.strip("|").split("|") for line in lines if line.startswith("| ") and "`" in line]
    assert len(rows) == 11
    for _, same, different in rows:
        for cell, expected in ((same, True), (different, False)):
            for group in cell.split(";"):
                first, *others = re.findall(r"`([^`]+)`", group)
                assert others
                for other in others:
                    assert judge(first, other).right == expected, (first, other)


def test_the_kind_of_a_solution_says_what_is_read():
    kinds = {
        "145°": "number",
        "2√3 + 1": "number",
        "x = 5": "number",
        "-∞": "number",
        "2x + 3": "expression",
        "2x + 3y = 0": "equation",
        "x > 3": "inequality",
        "B. 145°": "choice",
        "3 or 4": "set of answers",
        "(3, 4)": "tuple",
        "10:45": "time",
        "2024-01-06": "date",
        "1:3": "ratio",
        "3×4": "size",
        "3 apples": "text",
        "  $$ ": "empty",
        "9" * (MAX_CHARS + 1): "too long",
    }
    assert {text: kind_of(text) for text in kinds} == kinds


def test_formulas_that_are_hard_to_compute_end_soon():
    hard = [
        "9^" * 400 + "9",
        "2^(10^900*√2)",
        "(1/3)^(10^9*√2)",
        "√(2^√(3^√5))",
        "√2^√3*" * 150 + "1",
        "x^√3 or " * 62 + "1",
        "1/(x^40+y^41+z^42)+" * 50 + "1",
        "(x+1)^9*" * 120 + "1",
        "100!*" * 190 + "1",
        "1/97^97+" * 124 + "1",
        "(" * 490 + "3" + ")" * 490,
        "[1," * 200 + "1" + "]" * 200,
        "√" * 900 + "2",
        "sin " * 240 + "1",
        "\\frac{" * 150,
        "\\boxed{" * 140,
        "B. " * 330,
        "answer is " * 99,
    ]
    for text in hard:
        start = time.monotonic()
        judge(text, "2x + √3")
        judge(text, text[1:])
        kind_of(text)
        assert time.monotonic() - start < 2.0, text[:40]
