"""What `--help` says about the fields of a dataclass: their groups, and the text under each.

Both are read from the class and its source, so that a setting is explained where it is defined.
"""

import ast
import dataclasses
import inspect
import sys
from dataclasses import dataclass
from functools import cache
from itertools import pairwise


@dataclass
class Group:
    """Settings that `--help` shows together: those that one dataclass adds."""

    title: str
    about: str | None
    names: list[str]


def groups(cls: type) -> list[Group]:
    """The settings of a dataclass by the base that they come from, in the order of its fields."""
    bases = [each for each in reversed(cls.__mro__) if dataclasses.is_dataclass(each)]
    found: dict[type, list[str]] = {}
    for name in (f.name for f in dataclasses.fields(cls)):
        home = next(base for base in bases if name in inspect.get_annotations(base))
        found.setdefault(home, []).append(name)
    return [
        Group(
            title=home.__name__.removesuffix("Config").lower(),
            about=None if home is cls else inspect.getdoc(home),
            names=names,
        )
        for home, names in found.items()
    ]


def help_texts(cls: type) -> dict[str, str]:
    """The string under each field of a dataclass, or of its bases, in their source."""
    texts = {}
    for each in filter(dataclasses.is_dataclass, reversed(cls.__mro__)):
        for statement, below in pairwise(_class_bodies(each.__module__)[each.__name__]):
            match statement, below:
                case (
                    ast.AnnAssign(target=ast.Name(id=name)),
                    ast.Expr(value=ast.Constant(value=str(text))),
                ):
                    texts[name] = " ".join(text.split())
    return texts


@cache
def _class_bodies(module: str) -> dict[str, list[ast.stmt]]:
    tree = ast.parse(inspect.getsource(sys.modules[module]))
    return {node.name: node.body for node in ast.walk(tree) if isinstance(node, ast.ClassDef)}
