"""What a judge says about an answer."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Verdict:
    """Whether an answer is right, with the reason in words.

    >>> Verdict(False, "2 is not 3")
    Verdict(right=False, why='2 is not 3')
    """

    right: bool
    why: str
    """One clause, for whoever reads the completions of a run; model text in it is cut short."""
