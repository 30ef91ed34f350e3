"""The strict judge: whether the text of an answer says what the solution says, and why."""

from .judge import MAX_CHARS, judge, kind_of
from .verdict import Verdict

__all__ = ["MAX_CHARS", "Verdict", "judge", "kind_of"]
