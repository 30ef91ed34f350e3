"""The tags of a completion: whether its format is right, and what its answer tag holds."""

from ..types import Example
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


def tagged_answer(completion: str) -> str | None:
    """Return the text of the one answer tag; None unless there is exactly one, which is closed."""
    if completion.count("<answer>") != 1 or completion.count("</answer>") != 1:
        return None
    _, _, rest = completion.partition("<answer>")
    text, closing, _ = rest.partition("</answer>")
    return text if closing else None
