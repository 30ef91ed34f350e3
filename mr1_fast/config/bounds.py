"""What a setting's value may be beyond its type: the bounds of numbers, and what texts may hold.

What lies outside cannot be meant, or would ask for absurd memory. The bounds are wide: they refuse
slips, and not what is unusual. Settings of all commands are here by their names, so that one name
has the same bounds everywhere; what depends on other settings is checked in the classes.
"""

import re
from dataclasses import fields
from typing import Any

from ..errors import UserError, shortened
from ..setting_values import shown

MOST = 2**63 - 1
"""The largest whole number, which 64 bits hold."""
MOST_FLOAT = 1e30
"""The largest number, which 32 bits hold."""
MANY, MANY_ITEMS = 10**9, 10**6

BOUNDS: dict[str, tuple[float, float]] = {
    "batch_size": (1, 10**6),
    "beta": (0, MOST_FLOAT),
    "clip_low": (0, MOST_FLOAT),
    "difficulty": (1, 20),
    "entropy_coefficient": (0, MOST_FLOAT),
    "eval_every": (0, MANY),
    "eval_samples": (0, MANY_ITEMS),
    "gpus": (1, 10**6),
    "importance_cap": (0, MOST_FLOAT),
    "learning_rate": (0, 1e6),
    "lora_rank": (1, 16_384),
    "max_grad_norm": (0, MOST_FLOAT),
    "max_hours": (0, 1e6),
    "max_new_tokens": (1, 10**6),
    "max_pixels": (1, MANY),
    "max_prompt_tokens": (1, 10**7),
    "num_generations": (1, 2**16),
    "overlong_penalty": (0, 1),
    "pass_at": (1, 2**16),
    "patience": (0, MANY),
    "processes": (1, 1024),
    "prompts_per_step": (1, 10**5),
    "reward_seconds": (0, 1e7),
    "samples": (1, MANY_ITEMS),
    "save_every": (0, MANY),
    "seed": (0, MOST),
    "seeds": (0, MOST),
    "steps": (1, MANY),
    "target_kl": (0, MOST_FLOAT),
    "test_items": (1, MANY_ITEMS),
    "tokens_per_microbatch": (1, MANY),
    "top_k": (0, MANY),
    "train_samples": (1, MANY),
    "updates_per_batch": (1, 10**4),
    "vram": (0, 1e6),
    "warmup_fraction": (0, 1),
    "weight_decay": (0, 1e6),
}
"""The least and the most value of numbers by the names of their settings, in lists as well."""
NOT_ZERO = {
    *("learning_rate", "max_grad_norm", "max_hours", "reward_seconds", "target_kl", "vram"),
}
"""Those that must be greater than their least value, 0."""

PROSE = {"prompt_suffix", "prompt_template", "stop", "system_prompt"}
"""Texts that a model reads or writes; all the others name something, such as a file."""
MAY_BE_EMPTY = {"prompt_suffix", "system_prompt"}
WITH_OWN_RULES = {"settings"}
"""Settings that hold those of another command."""
LONGEST_PROSE, LONGEST_NAME, LONGEST_PART = 20_000, 4_000, 255
"""The most characters of prose; the most bytes of a name, and of its parts between slashes."""
MOST_ITEMS = 1_000
"""The most items of a list or a mapping."""


def check_values(config: Any) -> None:
    """Raise UserError for a setting of a dataclass that is outside of what is allowed here."""
    for field in fields(config):
        check_value(field.name, getattr(config, field.name))


def check_value(name: str, value: Any) -> None:
    """Raise UserError for a value of a setting, of the setting's type, that is not allowed here."""
    if rule := _broken_rule(name, value):
        raise UserError(f"{name} is {shortened(shown(value))}, but {rule}.")


def _broken_rule(name: str, value: Any) -> str:
    """Return the rule that a value breaks, as in `must be at least 1`; "" if it keeps all."""
    if name in WITH_OWN_RULES:
        return ""
    if isinstance(value, list | dict):
        return _rule_of_items(name, value)
    if isinstance(value, str):
        return _rule_of_prose(name, value) if name in PROSE else _rule_of_names(value)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return _rule_of_numbers(name, value)
    return ""


def _rule_of_items(name: str, values: list | dict) -> str:
    if len(values) > MOST_ITEMS:
        return f"must have at most {MOST_ITEMS:,} items"
    if isinstance(values, dict):
        found = (_rule_of_names(key) or _broken_rule(name, values[key]) for key in values)
    elif len({shown(value) for value in values}) < len(values):
        return "must be different values, none of them twice"
    else:
        found = (_broken_rule(name, value) for value in values)
    return next((f"each item {rule}" for rule in found if rule), "")


def _rule_of_numbers(name: str, value: float) -> str:
    of_type = MOST if isinstance(value, int) else MOST_FLOAT
    least, most = BOUNDS.get(name, (-of_type, of_type))
    if least <= value <= most and not (value == 0 and name in NOT_ZERO):
        return ""
    if (least, most) == (0, 1):
        return "must lie in [0, 1]"
    if value > most:
        return f"must be at most {shown(most)}"
    if name in NOT_ZERO:
        return "must be greater than 0"
    return "must not be negative" if least == 0 else f"must be at least {shown(least)}"


def _rule_of_prose(name: str, text: str) -> str:
    if not text and name not in MAY_BE_EMPTY:
        return "must not be empty"
    if _NO_CHARACTER.search(text):
        return "must be a text without NUL and halves of characters"
    return "" if len(text) <= LONGEST_PROSE else f"must have at most {LONGEST_PROSE:,} characters"


def _rule_of_names(name: str) -> str:
    if not name.strip():
        return "must not be empty"
    if _CONTROL.search(name) or _NO_CHARACTER.search(name):
        return "must be a name without control characters and halves of characters"
    content = name.encode()
    if len(content) > LONGEST_NAME or max(map(len, content.split(b"/"))) > LONGEST_PART:
        return f"must be shorter, with at most {LONGEST_PART} bytes between slashes"
    return ""


_CONTROL = re.compile("[\x01-\x1f\x7f]")
_NO_CHARACTER = re.compile("[\0\ud800-\udfff]")
"""NUL, which ends a text elsewhere, and halves of surrogate pairs, which cannot be written."""
