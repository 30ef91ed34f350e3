"""R1-V's rules: what they read in a completion, and the published verdicts that pin them."""

import json
import random
import re
from pathlib import Path

import pytest

from mr1_fast.rewards.math_check import math_equal
from mr1_fast.rewards.r1v import (
    number_verdict,
    r1v_counting,
    r1v_geometry,
    r1v_reward,
    tagged_integer,
)

DATA = Path(__file__).parents[3] / "shared" / "data"
published = pytest.mark.skipif(not DATA.is_dir(), reason="the published outputs are not here")


def test_the_reward_reads_the_whole_completion_as_r1v_does():
    cases = [
        (" 3 ", "3", True),
        (" 3 ", "4", False),
        (" 145° ", "145", True),
        ("3.0", "3", False),
        (" -3 ", "3", False),
        (r" $\frac{2}{4}$ ", r"\frac{1}{2}", True),
        (r" $\frac{2}{5}$ ", r"\frac{1}{2}", False),
        ("", "", False),
        ("\n    3\n", "3", True),
        (" (√{3}+1)小时 ", "(√{3}+1)小时", True),
        (" (√{3}+1)小时 ", "(√{3}+2)小时", False),
    ]
    for answer, solution, right in cases:
        text = f"<think>so 7</think><answer>{answer}</answer>"
        assert r1v_reward(text, solution).right == right, answer
    # R1-V reads the number after the word "answer", or, without a space in the tag, the last one.
    assert r1v_reward("the answer is 7 <answer>\n    3 </answer>", "7").right
    assert r1v_reward("so it is 7. <answer>3</answer>", "7").right
    assert r1v_reward("so it is 7. <answer>3</answer>", "3").right  # the exact text counts as well
    # Only the end of a long completion is read.
    assert not r1v_reward("<answer> 3/1 </answer>" + " so" * 3000, "3").right


def test_the_first_tagged_integer_is_what_evaluation_counts():
    assert r1v_counting("<answer>\n 4 </answer>", "4").right
    assert r1v_counting("<answer> four </answer> <answer> 4 </answer>", "4").right
    for text in (
        "<answer> 4.0 </answer>",
        "4",
        "<answer> 5 </answer>",
        "<answer> 4 apples </answer>",
    ):
        assert not r1v_counting(text, "4").right
    assert tagged_integer("<answer> 1234567890 </answer>") is None
    assert not r1v_counting("<answer> 4 </answer>", "four").right
    # Python refuses to convert a number of more than 4,300 digits.
    for digits in ("4" * 4301, "0" * 4301, "٤" * 4301, "4" * 10**6):
        assert not r1v_counting("<answer> 4 </answer>", digits).right
    assert r1v_counting("<answer> 4 </answer>", "0" * 4301 + "4").right
    assert r1v_counting("<answer> 0 </answer>", "00").right
    assert not r1v_counting("<answer> 0 </answer>", "").right


def plain_reward(output: str, solution: str) -> bool:
    """R1-V's accuracy_reward without short cuts, as the reference."""
    found = re.search(r"<answer>(.*?)</answer>", output)
    text = found.group(1).strip() if found else output.strip()
    return math_equal(output, solution) or text == solution.strip()


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
    verdicts = [r1v_geometry(r["model_output"], r["ground_truth"]).right for r in results]
    assert verdicts == [r["is_correct"] for r in results]
    assert (len(verdicts), sum(verdicts)) == (754, 231)
    scored = [r1v_reward(r["model_output"], r["ground_truth"]).right for r in results]
    assert scored == [plain_reward(r["model_output"], r["ground_truth"]) for r in results]
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
        right = r["extracted_answer"] == r["ground_truth"]
        assert r1v_counting(output, solution).right == right
        reward = r1v_reward(output, solution).right
        assert reward == plain_reward(output, solution) == math_equal(output, solution)
