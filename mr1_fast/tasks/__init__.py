"""Tasks: what is asked, how it is drawn or loaded, and when an output counts as right. One file per task."""

from types import ModuleType

from ..errors import UserError
from ..types import Example
from . import counting, figures, geometry

TASKS: dict[str, ModuleType] = {"counting": counting, "geometry": geometry, "figures": figures}
"""Each task module has `draw(split, seed, index, difficulty) -> Example` and `is_correct(output, solution) -> bool`."""

PROMPT_SUFFIX = "Output the thinking process in <think> </think> and final answer (number) in <answer> </answer> tags."
"""R1-V's suffix, in training and in evaluation."""


def get_task(name: str) -> ModuleType:
    """The task module of that name; UserError lists the known ones."""
    if name not in TASKS:
        raise UserError(
            f"task is {name!r}, but the known tasks are {', '.join(TASKS)}: choose one of them."
        )
    return TASKS[name]


def format_problem(example: Example) -> str:
    """The user's message, after the images: the problem, a space and the prompt suffix."""
    return f"{example.problem} {PROMPT_SUFFIX}"


def format_solution(example: Example) -> str:
    """The completion that supervised training imitates: `<think>5 items</think><answer> 5 </answer>`."""
    return f"<think>{example.thinking}</think>{format_answer(example)}"


def format_answer(example: Example) -> str:
    """The answer alone, as R1-V's data has it: `<answer> 5 </answer>`.

    It stands between spaces: math-verify overlooks the number in `<answer>5</answer>`.
    """
    return f"<answer> {example.solution} </answer>"
