"""Reward functions in their two forms: telling them apart, and the arguments that each is given.

    f(completion, example) -> float                              our form: one completion
    f(completions, prompts, **columns) -> list[float | None]     TRL's form: all of a step

Either may be async.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from inspect import Parameter
from typing import Any

from ..errors import UserError
from ..types import Example

RewardFunction = Callable[..., Any]
"""A function of either form."""

BATCHED = {"completions", "completion_ids", "prompts"}
"""Parameters that only a function of TRL's form has."""


@dataclass
class Batch:
    """B·G completions of a step; completion i belongs to example i // G."""

    completions: list[str]
    """B·G texts."""
    examples: list[Example]
    """B examples."""
    completion_ids: list[list[int]] | None = None
    """B·G lists of token ids."""
    trainer_state: Any = None
    """Where training stands: an object with `global_step` and `max_steps`."""

    @property
    def group_size(self) -> int:
        """G."""
        return len(self.completions) // len(self.examples)

    def example(self, index: int) -> Example:
        """Return the example of a completion."""
        return self.examples[index // self.group_size]

    def groups(self) -> list["Batch"]:
        """Return the completions of each example as a batch of its own."""
        size, ids = self.group_size, self.completion_ids
        return [
            Batch(
                self.completions[start : start + size],
                [example],
                None if ids is None else ids[start : start + size],
                self.trainer_state,
            )
            for start, example in zip(
                range(0, len(self.completions), size), self.examples, strict=True
            )
        ]


def is_batched(name: str, function: RewardFunction) -> bool:
    """Return whether a reward function has TRL's form, by its signature.

    Raises UserError for a function that can be called in neither form, or in either.
    """
    if inspect.isclass(function):
        raise UserError(
            f"{label(name, function)} is a class: name a function, or an object that is callable."
        )
    try:
        signature = inspect.signature(function)
    except (TypeError, ValueError) as error:
        raise UserError(
            f"{label(name, function)} does not show its parameters: wrap it in a function "
            "f(completion, example)."
        ) from error
    if BATCHED & _named(signature).keys():
        return True
    kinds = {parameter.kind for parameter in signature.parameters.values()}
    takes_two = _takes_two(signature)
    if takes_two and kinds != {Parameter.VAR_POSITIONAL, Parameter.VAR_KEYWORD}:
        return False
    if not takes_two and Parameter.VAR_KEYWORD in kinds:
        return True
    raise UserError(
        f"{label(name, function)} takes {signature}, but a reward function takes "
        "(completion, example), or (completions, prompts, **columns) as in TRL: name its "
        "parameters so, and use functools.wraps in a decorator."
    )


def arguments(name: str, function: RewardFunction, batch: Batch) -> dict[str, Any]:
    """Return the keyword arguments of a function of TRL's form: those that it accepts.

    Raises UserError if it needs a column that the data does not have.
    """
    offered = keyword_arguments(batch)
    signature = inspect.signature(function)
    named = _named(signature)
    for column, parameter in named.items():
        if column not in offered and parameter.default is Parameter.empty:
            raise UserError(
                f"{label(name, function)} needs the column {column!r}, which "
                f"{batch.examples[0].name} does not have: it has {', '.join(offered)}."
            )
    if any(parameter.kind is Parameter.VAR_KEYWORD for parameter in signature.parameters.values()):
        return offered
    return {column: value for column, value in offered.items() if column in named}


def keyword_arguments(batch: Batch) -> dict[str, Any]:
    """Return all that TRL's trainer would pass to a reward function for these completions.

    Every column of the data is a list with one value for each completion, None in rows that do not
    have it. As in TRL, prompts and completions are lists of messages where the data's prompt is
    one; otherwise they are texts.
    """
    examples = [batch.example(i) for i in range(len(batch.completions))]
    rows = [
        {
            "problem": example.problem,
            "solution": example.solution,
            "thinking": example.thinking,
            **example.extra,
            "images": list(example.images),  # as PIL has them, not as the data does
        }
        for example in examples
    ]
    names = dict.fromkeys(column for row in rows for column in row)
    offered: dict[str, Any] = {column: [row.get(column) for row in rows] for column in names}

    messages = [prompt_messages(example) for example in examples]
    offered["prompts"] = [
        example.problem if talk is None else talk
        for example, talk in zip(examples, messages, strict=True)
    ]
    offered["completions"] = [
        text if talk is None else [{"role": "assistant", "content": text}]
        for text, talk in zip(batch.completions, messages, strict=True)
    ]
    for column in ("prompt", "completion", "completion_ids"):  # TRL does not pass these columns
        offered.pop(column, None)
    if batch.completion_ids is not None:
        offered["completion_ids"] = batch.completion_ids
    if batch.trainer_state is not None:
        offered["trainer_state"] = batch.trainer_state
    return offered


def prompt_messages(example: Example) -> list[dict[str, Any]] | None:
    """Return the messages before the answer, if the example's row has its prompt as messages."""
    for column in ("prompt", "messages"):
        messages = example.extra.get(column)
        if not isinstance(messages, list) or not messages:
            continue
        if all(isinstance(message, dict) and "role" in message for message in messages):
            answered = len(messages) > 1 and messages[-1]["role"] == "assistant"
            return messages[:-1] if answered else messages
    return None


def label(name: str, function: RewardFunction) -> str:
    """Return what messages call a reward: its name and its function's."""
    while isinstance(function, partial):
        function = function.func
    own = getattr(function, "__qualname__", type(function).__qualname__)
    return f"The reward {name!r} (function {own})"


def _named(signature: inspect.Signature) -> dict[str, Parameter]:
    """Return the parameters that can be passed by their name."""
    kinds = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY)
    return {name: each for name, each in signature.parameters.items() if each.kind in kinds}


def _takes_two(signature: inspect.Signature) -> bool:
    """Return whether a function can be called as f(completion, example)."""
    try:
        signature.bind("", None)
    except TypeError:
        return False
    return True
