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

    Nothing outside the tag counts. A completion without any answer tag is wrong, or with
    `untagged` judged as a whole.
    """
    answer = tagged_answer(completion)
    if answer is None and untagged and not ("<answer>" in completion or "</answer>" in completion):
        answer = completion
    if answer is None:
        return Verdict(False, "there is not exactly one answer tag")
    return judge(answer, solution)


@reward("accuracy")
def accuracy_reward(completion: str, example: Example) -> float:
    """Return 1.0 if the completion's one answer tag holds the solution, otherwise 0.0."""
    return float(judge_completion(completion, example.solution).right)
