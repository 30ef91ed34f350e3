"""What the model is told about an example, and what supervised training imitates."""

from dataclasses import dataclass

from ..config import R1V_SUFFIX as PROMPT_SUFFIX
from ..config import TaskConfig
from ..types import Example
from .prompt_template import check_template, fill_template

IMAGE_MARK = "<image>"
"""What marks the place of an image in a problem or in what a template makes of it."""


@dataclass(frozen=True)
class PromptFormat:
    """How an example is put into words: the system message, and the text of the user's message.

    Raises UserError for a template that no row can fill in.
    """

    system: str | None = None
    """The system message; None takes the example's column `system`, and where that is no text
    leaves it to the model's chat template."""
    template: str | None = None
    """A Jinja template of the user's text; None stands for the problem, a space and the suffix."""
    suffix: str = PROMPT_SUFFIX
    """What follows the problem; it is not used where a template is given."""

    def __post_init__(self):
        if self.template is not None:
            check_template(self.template)

    @classmethod
    def of(cls, config: TaskConfig) -> "PromptFormat":
        """Return the format that the settings describe."""
        return cls(config.system_prompt, config.prompt_template, config.prompt_suffix)

    def system_text(self, example: Example) -> str | None:
        """Return the system message, or None where the model's chat template decides."""
        if self.system is not None:
            return self.system
        own = example.extra.get("system")
        return own if isinstance(own, str) else None

    def user_text(self, example: Example) -> str:
        """Return the text of the user's message, in which IMAGE_MARK stands for an image.

        Raises UserError where a template cannot be filled in. It has no answer: neither the
        solution nor the worked one.
        """
        if self.template is not None:
            columns = {**example.extra, "problem": example.problem}
            return fill_template(self.template, columns, example.name)
        return f"{example.problem} {self.suffix}" if self.suffix else example.problem


def format_problem(example: Example) -> str:
    """Return the user's message, which follows the images: the problem, a space and the suffix."""
    return PromptFormat().user_text(example)


def format_solution(example: Example) -> str:
    """Return the completion that supervised training imitates.

    For example: `<think>5 items</think><answer> 5 </answer>`.
    """
    return f"<think>{example.thinking}</think>{format_answer(example)}"


def format_answer(example: Example) -> str:
    """Return the answer alone, as R1-V's data has it: `<answer> 5 </answer>`."""
    return f"<answer> {example.solution} </answer>"
