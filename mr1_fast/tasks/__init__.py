"""Tasks: which items are drawn, how a problem is put to the model, and when an output is right.

Every task that draws its items is one file.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

from ..config import Judging
from ..errors import UserError
from ..rewards import CompletionJudge, judge_completion
from ..rewards.r1v import r1v_counting, r1v_geometry, r1v_reward
from ..types import Example
from . import arithmetic, counting, figures, geometry
from .prompts import PROMPT_SUFFIX, PromptFormat, format_answer, format_problem, format_solution

__all__ = [
    "DRAWN_TASKS",
    "PROMPT_SUFFIX",
    "TASKS",
    "PromptFormat",
    "Task",
    "format_answer",
    "format_problem",
    "format_solution",
    "get_task",
]


@dataclass(frozen=True)
class Task:
    """What a model is asked, and how its completions are judged."""

    name: str
    draw: Callable[..., Example] | None
    """`draw(split, seed, index, difficulty=1) -> Example`; None where items come from data alone.

    The same arguments give the same item, and no item belongs to two splits. Tasks with images take
    `painted=False`, which leaves the images out: painting them is most of the time."""
    r1v_evaluation: CompletionJudge
    """R1-V's rule by which it evaluates such a task; it trains every task by `r1v_reward`."""
    untagged: bool = False
    """Whether a completion without any answer tag is judged as a whole."""
    draws_images: bool = True
    """Whether its drawn items show images; those of the others are text alone."""

    def judge(self, judging: Judging, training: bool = False) -> CompletionJudge:
        """Return the judge of completions by its name, in evaluation or in training.

        The two differ for R1-V's rules alone.
        """
        if judging == "strict":
            return partial(judge_completion, untagged=self.untagged)
        return r1v_reward if training else self.r1v_evaluation

    def is_correct(self, completion: str, solution: str) -> bool:
        """Return whether a completion is right by the strict judge."""
        return self.judge("strict")(completion, solution).right


TASKS: dict[str, Task] = {
    task.name: task
    for task in (
        Task("counting", counting.draw, r1v_counting),
        Task("geometry", geometry.draw, r1v_geometry),
        Task("figures", figures.draw, r1v_counting),
        Task("arithmetic", arithmetic.draw, r1v_counting, draws_images=False),
        Task("free", None, r1v_reward, untagged=True),
    )
}
"""The tasks by name."""
DRAWN_TASKS: dict[str, Task] = {name: task for name, task in TASKS.items() if task.draw}
"""Those that draw their items."""


def get_task(name: str) -> Task:
    """Return the task of that name; raises UserError if there is none."""
    if name not in TASKS:
        raise UserError(
            f"task is {name!r}, but the known tasks are {', '.join(TASKS)}: choose one of them."
        )
    return TASKS[name]
