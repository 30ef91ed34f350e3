"""Arithmetic: true results, worked lines that are true in each step, and the difficulty."""

import re

import pytest

from mr1_fast.model.tiny import tiny_processor
from mr1_fast.profiles import answer_tokens
from mr1_fast.tasks import arithmetic, format_solution
from mr1_fast.tasks.split import SPLITS

OPERATIONS = {
    "+": lambda a, b: a + b,
    "-": lambda a, b: a - b,
    "×": lambda a, b: a * b,
}


def parts(example):
    first, kind, second = re.fullmatch(r"What is (\d+) (.) (\d+)\?", example.problem).groups()
    return int(first), kind, int(second)


@pytest.mark.parametrize("difficulty", [1, 2, 3])
def test_results_are_true_and_numbers_have_the_digits_of_the_difficulty(difficulty):
    examples = [arithmetic.draw("train", 1, index, difficulty) for index in range(600)]
    kinds = set()
    for example in examples:
        first, kind, second = parts(example)
        kinds.add(kind)
        assert int(example.solution) == OPERATIONS[kind](first, second)
        if kind == "×":
            assert len(str(first)) == difficulty and 2 <= second <= 9
        else:
            assert len(str(first)) == len(str(second)) == difficulty + 1
            assert 0 < int(example.solution) < 10 ** (difficulty + 1)
        assert not example.images and example.key == f"{first} {kind} {second}"
    assert kinds == ({"+", "-"} if difficulty == 1 else set(OPERATIONS))


@pytest.mark.parametrize("difficulty", [1, 2, 3])
def test_the_worked_line_leads_to_the_answer_digit_by_digit(difficulty):
    for index in range(600):
        example = arithmetic.draw("train", 2, index, difficulty)
        kind = parts(example)[1]
        digits = []
        for step in example.thinking.split(" "):
            shown, value = step.split("=")
            assert eval(shown.replace("×", "*")) == int(value)  # of digits and signs alone
            digits.append(value)
        *low, high = digits if kind != "-" else [str(int(value) % 10) for value in digits]
        answer = high + "".join(value[-1] for value in reversed(low))
        assert answer.lstrip("0") == example.solution


def test_carrying_and_borrowing_are_written_down():
    assert arithmetic._sum(47, 38) == (85, "7+8=15 4+3+1=8")
    assert arithmetic._sum(41, 38) == (79, "1+8=9 4+3=7")
    assert arithmetic._difference(503, 138) == (365, "13-8=5 10-1-3=6 5-1-1=3")
    assert arithmetic._product(78, 4) == (312, "8×4=32 7×4+3=31")


def test_no_split_asks_the_numbers_of_another_in_any_order():
    seen = {}
    for split in SPLITS:
        examples = [arithmetic.draw(split, 0, index) for index in range(3000)]
        seen[split] = {
            (kind, frozenset((a, b)) if kind != "-" else (a, b))
            for a, kind, b in map(parts, examples)
        }
    assert not seen["train"] & (seen["validation"] | seen["test"])
    assert not seen["validation"] & seen["test"]
    assert len(seen["test"]) > 700 and len(seen["validation"]) > 400
    orders = {a < b for a, kind, b in map(parts, examples) if kind == "+"}
    assert orders == {True, False}


@pytest.mark.parametrize("model", ["tiny-text", "tiny"])
def test_a_worked_solution_fits_into_a_built_in_model_s_answers(model):
    tokenizer = tiny_processor(model).tokenizer
    for difficulty in (1, 2, 3):
        examples = [arithmetic.draw("train", 0, index, difficulty) for index in range(300)]
        longest = max(len(tokenizer(format_solution(each)).input_ids) + 1 for each in examples)
        assert longest <= answer_tokens("arithmetic", difficulty) < longest + 8
