"""The tags of a completion: whether its format is right, and what its answer tag holds."""

from ..types import Example
from .registry import reward

TAGS = ("<think>", "</think>", "<answer>", "</answer>")


@reward("format")
def format_reward(completion: str, example: Example) -> float:
    """Return 1.0 if the completion is `<think>…</think>` and `<answer>…</answer>`, otherwise 0.0.

    Each tag must occur exactly once, and hold more than white space. Only white space may stand
    before, between and after the two: models often end with a line break, which says nothing.

    R1-V's pattern `<think>.*?</think>\\s*<answer>.*?</answer>` differs in three ways: it accepts
    empty tags, which a model can write without an answer; it accepts repeated tags, and so several
    answers; and it refuses white space at the ends.
    """
    if any(completion.count(tag) != 1 for tag in TAGS):
        return 0.0
    before, _, rest = completion.partition("<think>")
    thinking, _, rest = rest.partition("</think>")
    between, _, rest = rest.partition("<answer>")
    answer, closing, after = rest.partition("</answer>")
    is_in_order = bool(closing) and not (before + between + after).strip()
    return float(is_in_order and bool(thinking.strip()) and bool(answer.strip()))


def tagged_answer(completion: str) -> str | None:
    """Return the text of the one answer tag; None unless there is exactly one, which is closed."""
    if completion.count("<answer>") != 1 or completion.count("</answer>") != 1:
        return None
    _, _, rest = completion.partition("<answer>")
    text, closing, _ = rest.partition("</answer>")
    return text if closing else None
