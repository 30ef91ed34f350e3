"""Examples that a task draws."""

from ...errors import UserError
from ...types import Example
from .. import Task
from ..split import check_split
from .epochs import check_limit, shuffled


class DrawnExamples:
    """Examples drawn by a task module: endlessly many of them, or the first `limit` over and over.

    With a limit, `len()` returns it. What `take` and `take_more` return depends on the arguments
    alone.
    """

    def __init__(
        self, task: Task, split: str, seed: int, difficulty: int = 1, limit: int | None = None
    ) -> None:
        """Raise UserError for an unknown split, a difficulty or limit below 1, and a task that
        draws nothing.
        """
        if task.draw is None:
            raise UserError(f"task {task.name} draws no items: name data with --data.")
        check_split(split)
        check_limit(limit)
        if difficulty < 1:
            raise UserError(
                f"difficulty is {difficulty}, but the easiest is 1: set it to 1 or more."
            )
        self.task = task
        self.split = split
        self.seed = seed
        self.difficulty = difficulty
        self.limit = limit

    def __len__(self) -> int:
        if self.limit is None:
            raise TypeError("drawn examples without a limit have no length")
        return self.limit

    def take(self, step: int, count: int) -> list[Example]:
        """Return the `count` examples of training step `step`, counted from 0.

        With a limit, the examples are shuffled again in every epoch.
        """
        start = step * count
        if self.limit is None:
            indices = range(start, start + count)
        else:
            indices = shuffled(self.limit, self.seed, start, count)
        return [self._draw(index) for index in indices]

    def take_more(self, start: int, count: int) -> list[Example]:
        """Return entries `start` … `start + count − 1` of an endless list that no step takes from.

        With a limit, they are the same examples in another order.
        """
        if self.limit is None:
            return [self._draw(-1 - entry) for entry in range(start, start + count)]
        order = shuffled(self.limit, f"{self.seed} more", start, count)
        return [self._draw(index) for index in order]

    def all(self, count: int) -> list[Example]:
        """Return the first `count` examples, for evaluation, but no more than the limit."""
        if self.limit is not None:
            count = min(count, self.limit)
        return [self._draw(index) for index in range(count)]

    def fingerprint(self) -> str:
        """Return what tells two data apart: nothing beside the settings, since they say all."""
        return "drawn"

    def require_thinking(self) -> None:
        """Do nothing: drawn examples always have a worked solution."""

    def _draw(self, index: int) -> Example:
        return self.task.draw(self.split, self.seed, index, self.difficulty)
