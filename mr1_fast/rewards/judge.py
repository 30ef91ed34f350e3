"""Judging a completion: whether its format is right, and whether its answer is.

Completions are hostile input, since a model exploits whatever a reward lets through. The rules are
therefore strict, and they take time linear in the completion's length.
"""

import re
from decimal import Decimal

from ..types import Example
from .math_check import MAX_CHARS, math_equal
from .registry import reward

TAGS = ("<think>", "</think>", "<answer>", "</answer>")


@reward("format")
def format_reward(completion: str, example: Example) -> float:
    """Return 1.0 if the completion is `<think>…</think>` and `<answer>…</answer>`, otherwise 0.0.

    Only white space may stand between the two. Each tag must occur exactly once: R1-V's pattern
    `<think>.*?</think>\\s*<answer>.*?</answer>` also matches repeated tags, so a model could put
    several answers in one completion. As with R1-V's fullmatch, nothing may precede or follow, not
    even white space.
    """
    if any(completion.count(tag) != 1 for tag in TAGS):
        return 0.0
    if not (completion.startswith("<think>") and completion.endswith("</answer>")):
        return 0.0
    thinking_ends, answer_starts = completion.find("</think>"), completion.find("<answer>")
    between = completion[thinking_ends + len("</think>") : answer_starts]
    is_blank = not between or between.isspace()
    return float(thinking_ends < answer_starts and is_blank)


@reward("accuracy")
def accuracy_reward(completion: str, example: Example) -> float:
    """Return 1.0 if the completion's answer is right by R1-V's rule, otherwise 0.0.

    It is right if math-verify finds the solution in the completion (see math_equal), or if the text
    of its first answer tag is the solution, apart from white space at the ends. Without an answer
    tag the whole completion is that text. The cheap tests come first, which does not change the
    verdict.
    """
    solution = example.solution.strip()
    if solution and _answer_text(completion) == solution:
        return 1.0
    verdict = number_verdict(completion[-MAX_CHARS:], solution)
    return float(math_equal(completion, solution) if verdict is None else verdict)


def _answer_text(completion: str) -> str:
    """Return the stripped text of the first answer tag, or of the whole completion without one."""
    start = completion.find("<answer>")
    end = completion.find("</answer>", start)
    has_answer = start >= 0 and end >= 0
    return (completion[start + len("<answer>") : end] if has_answer else completion).strip()


_NUMBER = r"(?P<number>-?[0-9]{1,9}(?:\.[0-9]{1,6})?) ?(?:°|[a-z]{0,2}[²³]?)"
"""A plain decimal number with at most a degree sign or a short unit (`cm²`), which math-verify does
not read. Longer words stay out because math-verify takes `pct` for a percentage, and more decimals
because it rounds to six."""
_SOLUTION = re.compile(_NUMBER)
_ANSWER_AT_END = re.compile(rf"<answer>(?P<space>\s{{1,50}}){_NUMBER}\s{{0,50}}</answer>")
_ANCHOR = re.compile(r"(?i:final answer|answer:)|\\boxed")
_ANSWER_WORD = re.compile("(?i:answer)")


def number_verdict(output: str, solution: str) -> bool | None:
    """Return math_equal's verdict without math-verify, or None where only math-verify can tell.

    A verdict is returned where the answer tag and the solution hold plain numbers and math-verify
    would certainly compare these two. math-verify takes the last match of the first of its patterns
    that matches at all:
    - A boxed expression, "answer:" or "final answer", also in the reasoning, comes before the tag.
    - Next comes the number that follows the word "answer", with no line break before it except as
      the last character between, as in a tag.
    - Then comes the last number of all.

    It sees a number only after white space or `=`. So in `<answer>5</answer>` it overlooks the 5
    and takes a number from the reasoning, in R1-V as here.
    """
    gold = _SOLUTION.fullmatch(solution)
    if not gold:
        return None
    found = _ANSWER_AT_END.fullmatch(output.rstrip(), max(0, output.rfind("<answer>")))
    if not found or output.count("</answer>") != 1 or output.count("<answer>") != 1:
        return None
    if _ANCHOR.search(output):
        return None
    # The tags hold the word "answer" twice; a third one may precede a number in the reasoning.
    if "\n" in found["space"][:-1] and len(_ANSWER_WORD.findall(output)) > 2:
        return None
    return Decimal(found["number"]) == Decimal(gold["number"])
