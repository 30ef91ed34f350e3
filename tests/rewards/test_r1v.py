"""Verdicts on a completion's format and answer, beside R1-V's rule and its published verdicts."""

import json
import random
import re
from pathlib import Path

import pytest

from mr1_fast.rewards import accuracy_reward, format_reward, number_verdict
from mr1_fast.rewards.math_check import math_equal
from mr1_fast.tasks import counting

from ..data.hostile import example

DATA = Path(__file__).parents[3] / "shared" / "data"
published = pytest.mark.skipif(not DATA.is_dir(), reason="the published outputs are not here")


def test_format():
    good = "<think>a\n</think>\n \t<answer>\n3</answer>"
    bad = [
        "",
        "3",
        " " + good,
        good + "\n",
        good + "<answer>4</answer>",
        good.upper(),
        good.replace("\t", "so"),
    ]
    bad += ["<answer>3</answer><think>a</think>", "<think>a<answer>3</think></answer>"]
    for tag in ("<think>", "</think>", "<answer>", "</answer>"):
        bad += [
            good.replace(tag, ""),
            good.replace(tag, 2 * tag),
            good.replace("a\n", tag),
            good.replace("3", tag),
        ]
    for text in (good, "<think>a</think><answer>3</answer>", "<think></think><answer></answer>"):
        assert format_reward(text, example("3")) == 1.0
    for text in bad:
        assert format_reward(text, example("3")) == 0.0, text


def test_accuracy():
    cases = [
        (" 3 ", "3", 1.0),
        (" 3 ", "4", 0.0),
        (" 145° ", "145", 1.0),
        ("3.0", "3", 0.0),
        (" -3 ", "3", 0.0),
    ]
    cases += [
        (r" $\frac{2}{4}$ ", r"\frac{1}{2}", 1.0),
        (r" $\frac{2}{5}$ ", r"\frac{1}{2}", 0.0),
        ("", "", 0.0),
    ]
    cases += [
        ("\n    3\n", "3", 1.0),
        (" (√{3}+1)小时 ", "(√{3}+1)小时", 1.0),
        (" (√{3}+1)小时 ", "(√{3}+2)小时", 0.0),
    ]
    for answer, solution, value in cases:
        assert (
            accuracy_reward(f"<think>so 7</think><answer>{answer}</answer>", example(solution))
            == value
        ), answer
    # R1-V reads the number after the word "answer", or, without a space in the tag, the last one.
    assert accuracy_reward("the answer is 7 <answer>\n    3 </answer>", example("7")) == 1.0
    assert accuracy_reward("so it is 7. <answer>3</answer>", example("7")) == 1.0
    assert (
        accuracy_reward("so it is 7. <answer>3</answer>", example("3")) == 1.0
    )  # the exact text counts as well
    assert (
        accuracy_reward("<answer> 3/1 </answer>" + " so" * 3000, example("3")) == 0.0
    )  # only the end is read


def r1v_accuracy(output: str, solution: str) -> float:
    """R1-V's accuracy_reward without short cuts, as the reference."""
    found = re.search(r"<answer>(.*?)</answer>", output)
    text = found.group(1).strip() if found else output.strip()
    return float(math_equal(output, solution) or text == solution.strip())


def test_the_fast_path_for_numbers_agrees_with_math_verify():
    """Try reasoning that may hold the answer, spaces that hide it, units, and near misses."""
    rng = random.Random(3)
    thoughts = [
        "",
        "so 3 + 4 = 7",
        "The answer is 7",
        "answer: 7",
        "Final answer is 7",
        r"\boxed{7}",
        "$x = 7$",
        "$",
    ]
    thoughts += [
        "aNſwer 7,",
        "anſwer =\n",
        "answer = ",
        "thus [ 7 ] x",
        "(7",
        r"so \frac{1}{7}",
        "12 50% of 7",
        "A. 1",
    ]
    spaces = ("", " ", "\n", "\n   ", "  \n", " \u3000", " " * 50, " " * 51, " \n" * 20)
    numbers = (
        "7",
        "12",
        "-7",
        "7.0",
        "07",
        "7.5",
        "12.50",
        "0",
        "-0",
        "0.000001",
        "123456789",
        "1000",
    )
    units = ("", "°", "cm", "m²", " cm", "%", " percent", "pct", "米")
    decided = 0
    for _ in range(1500):
        space, number, unit = rng.choice(spaces), rng.choice(numbers), rng.choice(units)
        answer = f"{rng.choice(thoughts)}</think><answer>{space}{number}{unit}{rng.choice(spaces)}"
        output = f"<think>{answer}</answer>"
        solution = rng.choice((number, rng.choice(numbers))) + rng.choice(units)
        verdict = number_verdict(output, solution)
        if verdict is not None:
            decided += 1
            assert verdict == math_equal(output, solution), (output, solution)
    assert decided > 200


@published
def test_published_geometry_verdicts():
    results = json.loads((DATA / "geoqa_test_qwen2vl_7b_instruct_outputs.json").read_text())[
        "results"
    ]
    verdicts = [math_equal(r["model_output"], r["ground_truth"]) for r in results]
    assert verdicts == [r["is_correct"] for r in results]
    assert (len(verdicts), sum(verdicts)) == (754, 231)
    scored = [accuracy_reward(r["model_output"], example(r["ground_truth"])) for r in results]
    assert scored == [r1v_accuracy(r["model_output"], r["ground_truth"]) for r in results]
    # The two whose tag is right in text, while math-verify reads a number from the reasoning.
    assert [i for i, (a, b) in enumerate(zip(scored, verdicts, strict=True)) if a != b] == [
        361,
        556,
    ]


@published
def test_published_counting_verdicts():
    results = json.loads((DATA / "superclevr200_qwen2vl_2b_instruct_outputs.json").read_text())[
        "results"
    ]
    assert (len(results), sum(r["extracted_answer"] == r["ground_truth"] for r in results)) == (
        200,
        96,
    )
    for r in results:
        output, solution = r["model_output"], str(r["ground_truth"])
        assert counting.is_correct(output, solution) == (r["extracted_answer"] == r["ground_truth"])
        verdict = math_equal(output, solution)
        assert (
            accuracy_reward(output, example(solution)) == r1v_accuracy(output, solution) == verdict
        )
