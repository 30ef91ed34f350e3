"""Tasks: what is asked, how items are drawn or loaded, and when an output counts as right.

Every task is one file.
"""

from types import ModuleType

from ..errors import UserError
from ..types import Example
from . import counting, figures, geometry

TASKS: dict[str, ModuleType] = {"counting": counting, "geometry": geometry, "figures": figures}
"""The task modules by name.

Each has `draw(split, seed, index, difficulty) -> Example` and `is_correct(output, solution) ->
bool`.
"""

PROMPT_SUFFIX = (
    "Output the thinking process in <think> </think> and final answer (number) in "
    "<answer> </answer> tags."
)
"""What R1-V appends to every problem, in training and in evaluation."""


def get_task(name: str) -> ModuleType:
    """Return the task module of that name; raises UserError if there is none."""
    if name not in TASKS:
        raise UserError(
            f"task is {name!r}, but the known tasks are {', '.join(TASKS)}: choose one of them."
        )
    return TASKS[name]


def format_problem(example: Example) -> str:
    """Return the user's message, which follows the images: the problem, a space and the suffix."""
    return f"{example.problem} {PROMPT_SUFFIX}"


def format_solution(example: Example) -> str:
    """Return the completion that supervised training imitates.

    For example: `<think>5 items</think><answer> 5 </answer>`.
    """
    return f"<think>{example.thinking}</think>{format_answer(example)}"


def format_answer(example: Example) -> str:
    """Return the answer alone, as R1-V's data has it: `<answer> 5 </answer>`.

    The spaces are needed: math-verify overlooks the number in `<answer>5</answer>`.
    """
    return f"<answer> {example.solution} </answer>"
