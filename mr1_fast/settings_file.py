"""Settings as YAML text: read within bounds, and written so that they are read back as they were.

The YAML is plain. Every value is written out: a text, a number, true or false, null, a list or a
mapping, without aliases, tags and names that stand twice. A whole number is decimal, 1e-5 is a
number, and a date is a text, as in YAML 1.2. How much is read, how many values there are and how
deep they lie is bounded, so that any file is answered within a second.
"""

import os
import re
import stat
from collections import Counter
from pathlib import Path
from typing import Any

import yaml

from .errors import shortened

LARGEST = 512 * 1024
"""The most bytes of a file of settings."""
MOST_VALUES = 10_000
"""The most values, names among them, that a text holds."""
DEEPEST = 20
"""How many lists and mappings may lie within each other."""


class Unusable(Exception):
    """Settings that cannot be read: what comes after the name of their file, with the way out."""


class BeyondPlain(yaml.YAMLError):
    """YAML that is more than plain; the message says why, as in `has an alias in line 3`."""


def read_yaml_file(path: str | Path) -> Any:
    """Return the values in a regular file; raises Unusable where it cannot be read."""
    try:
        if not stat.S_ISREG(os.stat(path).st_mode):
            raise Unusable("is no regular file: name one that is.")
        with open(path, "rb") as file:
            content = file.read(LARGEST + 1)
    except OSError as error:
        raise Unusable(f"cannot be read ({error.strerror}): check the path.") from error
    except ValueError as error:  # of a path with a NUL
        raise Unusable(f"cannot be read ({error}): check the path.") from error

    if len(content) > LARGEST:
        raise Unusable(f"has more than {LARGEST:,} bytes: settings have a few thousand.")
    try:
        return load_yaml(content.decode("utf-8"))
    except UnicodeDecodeError as error:
        raise Unusable(f"is not a text file ({error}): choose another.") from error
    except BeyondPlain as error:
        raise Unusable(f"{error}, but settings are plain YAML: write each value out.") from error
    except yaml.YAMLError as error:
        reason = " ".join(str(error).replace('in "<unicode string>", ', "").split())
        raise Unusable(f"is not YAML ({shortened(reason, 200)}): correct it.") from error


def load_yaml(text: str) -> Any:
    """Return the values of a text; raises yaml.YAMLError for one that is no plain YAML."""
    if len(text) > LARGEST:
        raise BeyondPlain(f"has more than {LARGEST:,} characters")
    try:
        return yaml.load(text, Loader=PlainLoader)
    except (ValueError, OverflowError) as error:  # of "\U0FFFFFFF", which PyYAML passes to chr
        raise BeyondPlain("has a character that does not exist") from error


def dump_yaml(values: dict[str, Any]) -> str:
    """Return the values as a text from which any reader of YAML gets them back."""
    return yaml.dump(values, Dumper=PlainDumper, sort_keys=False, allow_unicode=True)


class PlainLoader(yaml.SafeLoader):
    """Reads plain YAML, and counts what it reads."""

    def __init__(self, text: str):
        super().__init__(text)
        self.values = self.depth = 0

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node:
        """Read one value, before anything is made of it."""
        event = self.peek_event()
        if isinstance(event, yaml.AliasEvent):
            self._refuse(f"an alias, *{shortened(event.anchor, 40)},", event)
        if event.tag is not None:
            self._refuse(f"a tag, {shortened(event.tag, 40)},", event)
        self.values += 1
        self.depth += 1
        if self.values > MOST_VALUES:
            self._refuse(f"more than {MOST_VALUES:,} values", event)
        if self.depth > DEEPEST:
            self._refuse(f"more than {DEEPEST} lists and mappings within each other", event)
        node = super().compose_node(parent, index)
        self.depth -= 1
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        """Return a mapping; of two values of one name, none can be meant."""
        values = super().construct_mapping(node, deep=deep)
        if len(values) < len(node.value):
            [(name, _)] = Counter(str(key.value) for key, _ in node.value).most_common(1)
            self._refuse(f"a mapping that names {shortened(name, 40)} twice", node)
        return values

    def construct_whole_number(self, node: yaml.ScalarNode) -> int:
        """Return a decimal number; Python reads no more than some thousand digits."""
        try:
            return int(node.value)
        except ValueError:
            self._refuse("a number of too many digits", node)

    def construct_number(self, node: yaml.ScalarNode) -> float:
        """Return a number, which is infinite where it is too large for one."""
        return float(re.sub(r"\.(?=inf|nan)", "", node.value.lower()))

    def _refuse(self, what: str, at: yaml.Event | yaml.Node) -> None:
        raise BeyondPlain(f"has {what} in line {at.start_mark.line + 1}")


class PlainDumper(yaml.SafeDumper):
    """Writes each value out, and a text in quotes where any reader would take it for another."""

    def ignore_aliases(self, data: Any) -> bool:
        """Return that no value is written as an alias of an equal one."""
        return True


def _text_in_quotes(dumper: yaml.Dumper, text: str) -> yaml.Node:
    """Return a text for YAML; one with breaks or controls is escaped, where no line is folded."""
    style = None if text.isprintable() else '"'
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, style=style)


_DIGITS = "[0-9]+(?:_[0-9]+)*"
_NUMBER = rf"""[-+]?(?:{_DIGITS}(?:\.(?:{_DIGITS})?)?|\.{_DIGITS})(?:[eE][-+]?[0-9]+)?
    |[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)"""
_PLAIN = {
    "null": ("~|null|Null|NULL|", ["~", "n", "N", ""]),
    "bool": ("(?i:yes|no|true|false|on|off)", list("yYnNtTfFoO")),
    "int": (rf"[-+]?{_DIGITS}", list("-+0123456789")),
    "float": (_NUMBER, list("-+.0123456789")),
}
"""What a value without quotes is, by its first letters; what is none of these is a text."""

PlainLoader.yaml_implicit_resolvers = {}
for _kind, (_pattern, _letters) in _PLAIN.items():
    for _class in (PlainLoader, PlainDumper):
        _whole = re.compile(rf"(?:{_pattern})\Z", re.VERBOSE)
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_kind}", _whole, _letters)
PlainLoader.add_constructor("tag:yaml.org,2002:int", PlainLoader.construct_whole_number)
PlainLoader.add_constructor("tag:yaml.org,2002:float", PlainLoader.construct_number)
PlainDumper.add_representer(str, _text_in_quotes)
