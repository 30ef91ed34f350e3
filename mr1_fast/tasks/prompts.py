"""What the model is told about an example, and what supervised training imitates."""

from dataclasses import dataclass

from ..config import R1V_SUFFIX as PROMPT_SUFFIX
from ..config import TaskConfig
from ..types import Example


@dataclass(frozen=True)
class PromptFormat:
    """How an example is put into words: the system message, and the text of the user's message."""

    system: str | None = None
    """The system message; None leaves it to the model's chat template."""
    template: str | None = None
    """A Jinja template of the user's text; None stands for the problem, a space and the suffix."""
    suffix: str = PROMPT_SUFFIX
    """What follows the problem; it is not used where a template is given."""

    @classmethod
    def of(cls, config: TaskConfig) -> "PromptFormat":
        """Return the format that the settings describe."""
        return cls(config.system_prompt, config.prompt_template, config.prompt_suffix)

    def user_text(self, example: Example) -> str:
        """Return the text of the user's message."""
        return f"{example.problem} {self.suffix}"


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
