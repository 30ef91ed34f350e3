"""The judges by which an evaluation counts, and how it reports them."""

from ..tasks.data import TEST_SETS

NAMES = {"strict": "the strict judge", "r1v": "R1-V's rule"}
"""What figures call a judge, by the value of the setting `judge`."""


def other_judges(judge: str, data: str) -> list[str]:
    """Return the judges whose figures are reported beside those of `judge`.

    On the published test sets that is the other one of the two: published figures follow R1-V's
    rule, and training the strict judge.
    """
    return [name for name in NAMES if name != judge] if data in TEST_SETS else []


def accuracy_text(summary: dict) -> str:
    """Return the accuracy of a summary in words: `accuracy 62.0% (95% interval 57.2%–66.6%)`."""
    low, high = summary["interval"]
    return f"accuracy {summary['accuracy']:.1%} (95% interval {low:.1%}–{high:.1%})"
