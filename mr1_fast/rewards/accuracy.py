"""Judging a completion by its answer: the reward `accuracy`, and what evaluation counts."""

from collections.abc import Callable

from ..types import Example
from .answers import Verdict, judge
from .format import tagged_answer
from .registry import reward

CompletionJudge = Callable[[str, str], Verdict]
"""A judge of a whole completion: its text and the bare solution give a Verdict."""


def judge_completion(completion: str, solution: str, untagged: bool = False) -> Verdict:
    """Return the strict verdict on a completion: its one answer tag must hold the solution.

    Nothing outside the tag counts, neither for the answer nor against it. A completion with no
    answer tag is wrong; with `untagged` it is judged as a whole, without the reasoning that ends
    with `</think>`. A completion with several answer tags is always wrong.
    """
    answer = tagged_answer(completion)
    if answer is not None:
        return judge(answer, solution)
    tags = max(completion.count("<answer>"), completion.count("</answer>"))
    if tags == 0 and untagged:
        return judge(completion.rpartition("</think>")[2], solution)
    if tags == 0:
        return Verdict(False, "there is no answer tag")
    if tags > 1:
        return Verdict(False, f"there are {tags} answer tags")
    return Verdict(False, "the answer tag is not complete")


@reward("accuracy")
def accuracy_reward(completion: str, example: Example) -> float:
    """Return 1.0 if the completion's one answer tag holds the solution, otherwise 0.0."""
    return float(judge_completion(completion, example.solution).right)
