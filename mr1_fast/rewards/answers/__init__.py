"""The strict judge: whether the text of an answer says what the solution says, and why."""

from .judge import judge
from .verdict import Verdict

__all__ = ["Verdict", "judge"]
