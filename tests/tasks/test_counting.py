"""Counting: answers that follow from the layout, and R1-V's verdict."""

import pytest

from mr1_fast.tasks import counting


def test_counting_answers_follow_from_the_layout():
    for difficulty in (1, 2, 3):
        examples = [counting.draw("train", 1, index, difficulty) for index in range(200)]
        for example in examples:
            cells = [int(item.split(":")[0]) for item in example.key.split(" ") if ":" in item]
            assert example.solution == str(len(set(cells)))
            assert example.thinking == f"{len(cells)} items"
        assert (
            max(int(example.solution) for example in examples) > difficulty**2 + 4 * difficulty + 1
        )


@pytest.mark.parametrize(
    "output, right",
    [
        ("<think>2+0+3</think><answer>5</answer>", True),
        ("<answer> 5 </answer> and <answer>6</answer>", True),
        ("<answer>4</answer>", False),
        ("5", False),
        ("<answer>5 items</answer>", False),
        ("<answer>" + "5" * 5000 + "</answer>", False),
    ],
)
def test_counting_verdict(output, right):
    assert counting.is_correct(output, "5") is right
