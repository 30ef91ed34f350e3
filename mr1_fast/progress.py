"""What the evaluations of a run have shown so far: the best step, and how long ago it was."""

from pathlib import Path

from .errors import UserError
from .report.records import read_steps


class Progress:
    """The greedy accuracy on held-out items, by the number of steps that were done before.

    It has no other state, so that a resumed run reads all of it from evaluations.jsonl. `seconds`
    is what the longest evaluation of earlier processes has taken; 0 where none is known.
    """

    def __init__(self, accuracies: dict[int, float] | None = None, seconds: float = 0.0):
        self.accuracies = accuracies or {}
        self.seconds = seconds

    @classmethod
    def read(cls, path: Path, last: int) -> "Progress":
        """Read a file of evaluations, up to the one after `last` steps, if there is a file.

        Raises UserError for a line that is no evaluation.
        """
        accuracies, longest = {}, 0.0
        for number, (step, record, _) in enumerate(read_steps(path), start=1):
            accuracy = record.get("accuracy")
            is_share = isinstance(accuracy, int | float) and 0 <= accuracy <= 1
            if not is_share or isinstance(accuracy, bool):
                raise UserError(f"{path} line {number} has no accuracy: remove it.")
            if step <= last:
                accuracies[step] = float(accuracy)
            seconds = record.get("seconds")
            if isinstance(seconds, int | float) and longest < seconds < float("inf"):
                longest = float(seconds)
        return cls(accuracies, longest)

    def best(self, last: float = float("inf")) -> int | None:
        """Return the step of the highest accuracy up to step `last`, the earliest of equal ones.

        It is None before the first evaluation.
        """
        steps = [step for step in self.accuracies if step <= last]
        return min(steps, key=lambda step: (-self.accuracies[step], step), default=None)

    @property
    def waiting(self) -> int:
        """How many evaluations in a row have not been better than the best before them."""
        best = self.best()
        return sum(step > best for step in self.accuracies) if best is not None else 0
