"""R1-V's rules for whether a completion is right, which its published verdicts pin.

They are kept for comparison with published figures (`--judge r1v`). They can be met without the
answer: math-verify reads the whole completion and compares the number that it recognises.
"""

import re
from decimal import Decimal

from .answers import Verdict
from .math_check import MAX_CHARS, math_verdict


def r1v_reward(completion: str, solution: str) -> Verdict:
    """Return the verdict of R1-V's accuracy reward, by which R1-V trains.

    The completion is right if math-verify finds the solution in it (see math_equal), or if the text
    of its first answer tag is the solution, apart from white space at the ends. Without an answer
    tag the whole completion is that text. The cheap tests come first, which does not change the
    verdict.
    """
    solution = solution.strip()
    if solution and _answer_text(completion) == solution:
        return Verdict(True, "the answer is the solution's text")
    verdict = number_verdict(completion[-MAX_CHARS:], solution)
    return _verdict(math_verdict(completion, solution) if verdict is None else verdict)


def r1v_geometry(completion: str, solution: str) -> Verdict:
    """Return the verdict of R1-V's evaluation on GeoQA: whether math-verify finds the solution."""
    return _verdict(math_verdict(completion, solution))


def _verdict(found: bool | None) -> Verdict:
    """Return what math-verify says, in words; None if it could not read the completion."""
    if found is None:
        return Verdict(False, "math-verify cannot read the completion")
    return Verdict(found, "math-verify finds the solution" if found else "math-verify finds it not")


def r1v_counting(completion: str, solution: str) -> Verdict:
    """Return the verdict of R1-V's evaluation on SuperCLEVR.

    The completion is right if the first tagged integer equals the solution.
    """
    found = tagged_integer(completion)
    right = solution.strip().isdecimal() and found == int(solution)
    return Verdict(right, f"the first tagged integer is {found}")


def tagged_integer(completion: str) -> int | None:
    """Return the integer in the first answer tag that holds one, or None.

    Only integers of at most nine digits are read, since Python refuses to convert very long ones.
    """
    found = re.search(r"<answer>\s*(\d{1,9})\s*</answer>", completion)
    return int(found[1]) if found else None


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
