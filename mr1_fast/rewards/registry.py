"""Rewards: functions of a completion and its example, found by name. A user's own is one decorator away:

    from mr1_fast.rewards import reward

    @reward("brief")
    def brief(completion, example):
        return float(len(completion) < 400)

Completions are hostile input: a model farms whatever a reward lets through, so these are strict and take linear time.
"""

import importlib.util
import math
import re
import sys
from collections.abc import Callable, Iterable
from decimal import Decimal
from importlib.machinery import SourceFileLoader
from pathlib import Path

import torch

from ..errors import UserError
from ..types import Example
from .math_check import MAX_CHARS, math_equal

RewardFunction = Callable[[str, Example], float]

REWARDS: dict[str, RewardFunction] = {}
"""Every registered reward by name."""


def reward(name: str) -> Callable[[RewardFunction], RewardFunction]:
    """Register the decorated function `f(completion, example) -> float` as the reward `name`.

    Raises ValueError if the name is taken.
    """

    def register(function: RewardFunction) -> RewardFunction:
        if name in REWARDS:
            raise ValueError(f"There is already a reward named {name!r}; choose another name.")
        REWARDS[name] = function
        return function

    return register


@reward("format")
def format_reward(completion: str, example: Example) -> float:
    """1.0 if the whole completion is `<think>…</think>`, optional white space, `<answer>…</answer>`; otherwise 0.0.

    Each tag must occur exactly once: R1-V's pattern `<think>.*?</think>\\s*<answer>.*?</answer>` also matches repeated
    tags, so a model could put several answers in one completion. As with R1-V's fullmatch, nothing may precede or
    follow, not even white space.
    """
    if any(completion.count(tag) != 1 for tag in ("<think>", "</think>", "<answer>", "</answer>")):
        return 0.0
    if not (completion.startswith("<think>") and completion.endswith("</answer>")):
        return 0.0
    close, open_ = completion.find("</think>"), completion.find("<answer>")
    between = completion[close + len("</think>") : open_]
    return float(close < open_ and (not between or between.isspace()))


@reward("accuracy")
def accuracy_reward(completion: str, example: Example) -> float:
    """1.0 if the completion is right, otherwise 0.0: R1-V's rule.

    Right is a completion in which math-verify finds the solution (see math_equal), or whose first answer tag is the
    solution's exact text, ends stripped; without an answer tag the whole completion is that text. The cheap tests come
    first; they do not change the verdict.
    """
    solution = example.solution.strip()
    if solution and _answer_text(completion) == solution:
        return 1.0
    verdict = _number_verdict(completion[-MAX_CHARS:], solution)
    return float(math_equal(completion, solution) if verdict is None else verdict)


def _answer_text(completion: str) -> str:
    """The text of the first answer tag, or the whole completion if there is none; ends stripped."""
    open_ = completion.find("<answer>")
    close = completion.find("</answer>", open_)
    text = completion if open_ < 0 or close < 0 else completion[open_ + len("<answer>") : close]
    return text.strip()


_NUMBER = r"(?P<number>-?[0-9]{1,9}(?:\.[0-9]{1,6})?) ?(?:°|[a-z]{0,2}[²³]?)"
"""A plain decimal number with at most a degree sign or a short unit (`cm²`), which math-verify does not read.
Longer words stay out because `pct` is a percentage to it, and more decimals because it rounds to six."""
_SOLUTION = re.compile(_NUMBER)
_ANSWER_AT_END = re.compile(rf"<answer>(?P<space>\s{{1,50}}){_NUMBER}\s{{0,50}}</answer>")
_ANCHOR = re.compile(r"(?i:final answer|answer:)|\\boxed")
_ANSWER_WORD = re.compile("(?i:answer)")


def _number_verdict(output: str, solution: str) -> bool | None:
    """math_equal's verdict where answer tag and solution are plain numbers and it is sure to compare those two.

    math-verify takes the last match of its first pattern that matches at all. Of numbers it only sees those after white
    space or `=`, so in `<answer>5</answer>` it overlooks the 5 and takes one from the reasoning (R1-V has the same
    verdicts); and a boxed expression, "answer:" or "final answer" in the reasoning comes before the tag. Next in order
    is the number that follows the word "answer" with no line break but the last character between, as in a tag; and
    then the last number of all. None means: ask math-verify.
    """
    gold = _SOLUTION.fullmatch(solution)
    found = (
        _ANSWER_AT_END.fullmatch(output.rstrip(), max(0, output.rfind("<answer>")))
        if gold
        else None
    )
    if (
        not found
        or output.count("</answer>") != 1
        or output.count("<answer>") != 1
        or _ANCHOR.search(output)
    ):
        return None
    if "\n" in found["space"][:-1] and len(_ANSWER_WORD.findall(output)) > 2:
        return None
    return Decimal(found["number"]) == Decimal(gold["number"])


def load_plugin(path: str | Path) -> None:
    """Run a Python file so that the functions it decorates with `@reward` are registered; a second load does nothing.

    Raises UserError if the file is missing or fails; then none of its rewards stay registered.
    """
    path = Path(path).expanduser().resolve()
    if not path.is_file():
        raise UserError(f"The reward file {path} does not exist.")
    name = f"mr1_fast_plugin:{path}"
    if name in sys.modules:
        return
    before = dict(REWARDS)
    loader = SourceFileLoader(name, str(path))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader(name, loader))
    sys.modules[name] = module  # dataclasses look their module up
    try:
        loader.exec_module(module)
    except (Exception, SystemExit) as error:
        del sys.modules[name]
        REWARDS.clear()
        REWARDS.update(before)
        raise UserError(
            f"The reward file {path} fails with {type(error).__name__}: {error}"
        ) from error


def score(
    completions: list[str], examples: list[Example], weights: dict[str, float]
) -> tuple[torch.Tensor, dict[str, list[float]]]:
    """Weighted sum of the named rewards for B examples with G completions each.

    `completions` has B·G texts; text i belongs to example i // G. `weights` maps reward names to their weights; a
    reward of weight 0 is computed too, for the log. Returns the sums, (B, G) float32, and each reward's B·G values.
    Raises UserError for an unknown name, and for a function that raises or returns anything but a finite number.
    """
    if not examples or len(completions) % len(examples):
        raise ValueError(
            f"{len(completions)} completions cannot be shared out evenly among {len(examples)} examples."
        )
    require_rewards(weights)
    group = len(completions) // len(examples)
    values = {
        name: [
            _value(name, completion, examples[i // group])
            for i, completion in enumerate(completions)
        ]
        for name in weights
    }
    total = torch.zeros(len(completions), dtype=torch.float64)
    for name, weight in weights.items():
        total += weight * torch.tensor(values[name], dtype=torch.float64)
    return total.float().view(len(examples), group), values


def require_rewards(names: Iterable[str]) -> None:
    """Raise UserError unless every name is that of a registered reward."""
    for name in names:
        if name not in REWARDS:
            raise UserError(
                f"There is no reward named {name!r}; the known ones are {', '.join(sorted(REWARDS))}."
            )


def _value(name: str, completion: str, example: Example) -> float:
    """One reward of one completion, checked, since a single NaN would spoil every weight of the model."""
    function = REWARDS[name]
    try:
        value = function(completion, example)
    except UserError:
        raise
    except Exception as error:
        raise UserError(
            f"The reward {name!r} (function {function.__qualname__}) raised {type(error).__name__}: {error}"
        ) from error
    try:
        number = (
            float(value) if hasattr(value, "__float__") else math.nan
        )  # float() would read numbers out of strings
    except (TypeError, ValueError, OverflowError, RuntimeError):
        number = math.nan
    if not abs(number) <= torch.finfo(torch.float32).max:
        raise UserError(
            f"The reward {name!r} (function {function.__qualname__}) must return a finite number, not {value!r:.200}"
        )
    return number
