"""Judging completions: what is the answer in them, and that nothing else counts."""

import pytest

from mr1_fast.rewards import accuracy_reward, judge_completion
from mr1_fast.tasks import get_task

from ..data.hostile import example
from .answers.pairs import RIGHT
from .answers.wrong_pairs import WRONG


def right(completion: str, solution: str) -> bool:
    """The verdict of the reward and of every task's evaluation, which must be one."""
    verdicts = {judge_completion(completion, solution).right}
    verdicts |= {
        get_task(name).is_correct(completion, solution) for name in ("counting", "geometry")
    }
    verdicts.add(accuracy_reward(completion, example(solution)) == 1.0)
    assert len(verdicts) == 1
    return verdicts.pop()


@pytest.mark.parametrize(
    "answer", ["", " ", "unknown", "5", "I cannot tell", "\\boxed{}", "3 or 5", "not 3"]
)
def test_reasoning_does_not_stand_in_for_an_answer(answer):
    for thought in ("the total is 3", "answer: 3", "\\boxed{3}", "The final answer is 3."):
        assert not right(f"<think>{thought}</think><answer>{answer}</answer>", "3")
        assert not right(f"<think>{thought}</think><answer> {answer} </answer>", "3")


def test_reasoning_does_not_spoil_an_answer():
    for thought in ("it is 5", "answer: 5", "\\boxed{5}", "The final answer is 5.", ""):
        assert right(f"<think>{thought}</think><answer> 3 </answer>", "3")
        assert right(f"<think>{thought}</think><answer>3</answer> so 5", "3")


@pytest.mark.parametrize("kind", RIGHT)
def test_spaces_in_the_tag_change_no_verdict(kind):
    for pairs, expected in ((RIGHT[kind], True), (WRONG.get(kind, []), False)):
        for answer, solution in pairs:
            text = f"<think>437 + 468 = 905, and 7 more</think><answer>{answer}</answer>"
            spaced = text.replace("<answer>", "<answer> ").replace("</answer>", "\n </answer>")
            assert right(text, solution) == right(spaced, solution) == expected, (answer, solution)


def test_only_one_answer_tag_is_judged():
    for text, why in [
        ("3", "there is no answer tag"),
        ("", "there is no answer tag"),
        ("<answer>3</answer><answer>3</answer>", "there are 2 answer tags"),
        ("<answer>3</answer><answer>4", "there are 2 answer tags"),
        ("<answer>3", "the answer tag is not complete"),
        ("3</answer>", "the answer tag is not complete"),
        ("</answer>3<answer>", "the answer tag is not complete"),
    ]:
        for untagged in (False, True):
            verdict = judge_completion(text, "3", untagged)
            if text == "3" and untagged:
                assert verdict.right
            elif text:
                assert (verdict.right, verdict.why) == (False, why)
            else:
                assert not verdict.right


def test_without_a_tag_the_whole_completion_is_judged_where_a_task_says_so():
    assert get_task("free").is_correct(" 3. ", "3")
    assert get_task("free").is_correct("<think>so 5</think>\n**3**", "3")
    assert not get_task("free").is_correct("<think>so 3</think>", "3")
    assert not get_task("free").is_correct("so 3", "3")
    assert not get_task("free").is_correct("<answer>5</answer> 3", "3")
    assert not get_task("counting").is_correct("3", "3")


def test_letters_and_units_are_judged_in_evaluation_as_in_training():
    text = "<think>so</think><answer> B </answer>"
    assert all(get_task(name).is_correct(text, "B") for name in ("counting", "geometry", "figures"))
    assert get_task("counting").is_correct("<answer> 145° </answer>", "145°")
    assert not get_task("counting").is_correct("<answer> 145° </answer>", "155°")
