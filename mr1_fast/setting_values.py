"""Converts what a flag or a YAML file says into the type of a setting, and describes the types.

The types ("kinds") are str, int, float (finite), bool, `Literal` of texts, `list[kind]`,
`dict[str, kind]`, `kind | None`, `kind | Literal` of texts and `Any`.
"""

import json
import math
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin

import yaml

from .errors import shortened
from .settings_file import BeyondPlain, load_yaml


class Unfit(Exception):
    """A value that a setting cannot have: `many, but must be a whole number`."""

    def __init__(self, value: Any, must_be: str):
        words = "blank" if value is None else shortened(shown(value))
        super().__init__(f"{words}, but must be {must_be}")
        self.must_be = must_be


def convert(value: Any, kind: Any) -> Any:
    """Convert the text of a flag, or a value of a YAML file, to the type `kind`.

    Raises Unfit for a value that the type does not have. The text of a list or a mapping is YAML.
    For `kind | None`, null and ~ are None.
    """
    origin, arguments = get_origin(kind), get_args(kind)
    if kind != _without_none(kind):
        return None if value in (None, "null", "~") else convert(value, _without_none(kind))
    if words := _words_beside(kind):
        try:
            return value if value in words else convert(value, arguments[0])
        except Unfit as error:
            raise Unfit(value, f"{error.must_be} or {' or '.join(words)}") from error
    if origin is Literal:
        if value not in arguments:
            raise Unfit(value, f"one of {', '.join(arguments)}")
        return value
    if origin is list:
        items = _from_yaml(value, _LIST)
        if not isinstance(items, list):
            raise Unfit(value, _LIST)
        return [convert(item, arguments[0]) for item in items]
    if origin is dict:
        items = _from_yaml(value, _MAPPING)
        if not isinstance(items, dict) or not all(isinstance(name, str) for name in items):
            raise Unfit(value, _MAPPING)
        return {name: convert(item, arguments[1]) for name, item in items.items()}
    return value if kind is Any else _SCALARS[kind](value)


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise Unfit(value, "a text (write it in quotes)")
    return value


def _whole_number(value: Any) -> int:
    try:
        if isinstance(value, str) or type(value) is int:
            return int(value)
    except ValueError:
        pass
    raise Unfit(value, "a whole number")


def _finite_number(value: Any) -> float:
    try:
        if not isinstance(value, bool) and math.isfinite(number := float(value)):
            return number
    except (TypeError, ValueError, OverflowError):
        pass
    raise Unfit(value, "a finite number")


def _truth(value: Any) -> bool:
    if isinstance(value, bool):
        return value
    word = value.lower() if isinstance(value, str) else ""
    if word in ("true", "yes", "on"):
        return True
    if word in ("false", "no", "off"):
        return False
    raise Unfit(value, "true or false")


_LIST, _MAPPING = "a list such as '[a, b]'", "a mapping such as '{\"name\": 0.1}'"
_SCALARS = {str: _text, int: _whole_number, float: _finite_number, bool: _truth}


def _from_yaml(value: Any, must_be: str) -> Any:
    """Return what the text of a flag holds; the text itself if it is not YAML.

    Raises Unfit where the YAML is more than plain, as in a file.
    """
    if not isinstance(value, str):
        return value
    try:
        return load_yaml(value)
    except BeyondPlain as error:
        raise Unfit(value, f"{must_be} in plain YAML, and this {error}") from error
    except yaml.YAMLError:
        return value


def metavar(kind: Any) -> str:
    """What `--help` shows in the place of a flag's value."""
    kind = _without_none(kind)
    if words := _words_beside(kind):
        return "|".join((metavar(get_args(kind)[0]), *words))
    if get_origin(kind) is Literal:
        return f"{{{','.join(get_args(kind))}}}"
    names = {bool: "true|false", int: "N", float: "X", list: "LIST", dict: "MAPPING"}
    return names.get(get_origin(kind) or kind, "TEXT")


def described(kind: Any) -> str:
    """The values that a kind has, in words; empty where `metavar` says it all."""
    origin, arguments = get_origin(kind), get_args(kind)
    if kind is str:
        return ""
    if kind != _without_none(kind):
        return f"{_WORDS.get(_without_none(kind), 'value')} or null"
    if words := _words_beside(kind):
        return " or ".join((_WORDS.get(arguments[0], "value"), *words))
    if origin is list:
        [item] = arguments
        choices = ", ".join(get_args(item))
        return f"list of {choices or _WORDS[item] + 's'}"
    if origin is dict:
        return f"mapping of names to {_WORDS.get(arguments[1], 'value')}s"
    return _WORDS.get(kind, "")


_WORDS = {str: "text", int: "whole number", float: "number"}


def _without_none(kind: Any) -> Any:
    """`X` for the kind `X | None`, and every other kind as it is."""
    if get_origin(kind) not in (Union, UnionType) or NoneType not in get_args(kind):
        return kind
    [kind] = [each for each in get_args(kind) if each is not NoneType]
    return kind


def _words_beside(kind: Any) -> tuple[str, ...]:
    """The texts that a kind `X | Literal[…]` may have beside those of X; empty for other kinds."""
    if get_origin(kind) not in (Union, UnionType) or NoneType in get_args(kind):
        return ()
    return get_args(get_args(kind)[1])


def shown(value: Any) -> str:
    """A value as a command line has it."""
    if isinstance(value, str):
        return value or "''"
    return json.dumps(value, ensure_ascii=False, default=str)
