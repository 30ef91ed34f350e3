"""Jinja templates of prompts, in a sandbox that reaches nothing but the row and cannot run away.

A template has the values of one row, loops, conditions, filters and the methods listed here. What
it may make is bounded: the template and each text that it makes in characters, its loops in turns.
"""

import json
from collections.abc import Iterable, Mapping
from functools import lru_cache
from itertools import islice
from typing import Any

from jinja2 import (
    StrictUndefined,
    Template,
    TemplateError,
    TemplateSyntaxError,
    Undefined,
    nodes,
    pass_context,
)
from jinja2.filters import FILTERS
from jinja2.runtime import Context, LoopContext
from jinja2.sandbox import ImmutableSandboxedEnvironment, SecurityError
from jinja2.visitor import NodeTransformer

from ..errors import UserError

MAX_TEMPLATE = 10_000
"""Characters that a template may have."""
MAX_TEXT = 100_000
"""Characters that a template may write, and that a text or list which it makes may have."""
MAX_TURNS = 1_000
"""Turns of all the loops of a template together, for one row."""
MAX_NESTING = 50
"""How deep the parts of a template may lie within each other."""

ALLOWED_NODES = (
    *(nodes.Template, nodes.Output, nodes.TemplateData, nodes.For, nodes.If, nodes.Assign),
    *(nodes.Name, nodes.Const, nodes.List, nodes.Tuple, nodes.Getattr, nodes.Getitem, nodes.Slice),
    *(nodes.Add, nodes.Sub, nodes.Mul, nodes.Div, nodes.FloorDiv, nodes.Mod, nodes.Neg, nodes.Pos),
    *(nodes.And, nodes.Or, nodes.Not, nodes.Compare, nodes.Operand, nodes.CondExpr),
    *(nodes.Concat, nodes.Filter, nodes.Test, nodes.Call, nodes.Keyword),
)
"""What a template may consist of: neither macros, blocks and imports, nor powers."""

ALLOWED_FILTERS = (
    "abs capitalize d default dictsort first float int items last length list lower max min "
    "reject reverse select sort string title trim unique upper"
)
"""Filters of Jinja whose result is no longer than what they are given."""

ALLOWED_METHODS: dict[type, str] = {
    str: "capitalize count endswith find isalpha isdigit lower lstrip removeprefix removesuffix "
    "rstrip split splitlines startswith strip title upper",
    dict: "get items keys values",
    list: "count index",
    LoopContext: "index index0 revindex revindex0 first last length previtem nextitem",
}
"""Methods and attributes that a template may use, by the type that has them."""


def check_template(source: str) -> None:
    """Raise UserError for a template that no row can fill in."""
    _compiled(source)


def fill_template(source: str, columns: Mapping[str, Any], name: str) -> str:
    """Return the template with the columns of a row filled in; messages call the row `name`."""
    template = _compiled(source)
    pieces, length = [], 0
    try:
        for piece in template.generate({**columns, _TURNS: [MAX_TURNS]}):
            pieces.append(piece)
            length += len(piece)
            _check_length(length)
    except Exception as error:  # expressions fail in all the ways that Python has
        raise UserError(
            f"the prompt template cannot be filled in for {name} ({_reason(error)}): correct "
            f"--prompt-template; the row has {', '.join(columns)}, and never shows its solution."
        ) from error
    return "".join(pieces)


def _reason(error: Exception) -> str:
    """Return what went wrong in one line."""
    return " ".join(str(error).split()).rstrip(".") or type(error).__name__


@lru_cache
def _compiled(source: str) -> Template:
    """Return the template, made ready; raises UserError where it is not allowed."""
    environment = _Sandbox(undefined=StrictUndefined)
    try:
        if len(source) > MAX_TEMPLATE:
            raise SecurityError(f"it has {len(source)} characters, more than {MAX_TEMPLATE}")
        tree = environment.parse(source)
        _check_nodes(tree)
        return environment.from_string(_Bounded().visit(tree))
    except (TemplateError, SyntaxError, RecursionError, MemoryError, ValueError) as error:
        where = f" on line {error.lineno}" if isinstance(error, TemplateSyntaxError) else ""
        raise UserError(
            f"the prompt template is not valid{where} ({_reason(error)}): correct "
            "--prompt-template; docs/prompts.md shows what it may have."
        ) from error


def _check_nodes(node: nodes.Node, depth: int = 0) -> None:
    """Raise SecurityError unless a template consists of what is allowed."""
    kind = type(node).__name__
    if depth > MAX_NESTING:
        raise SecurityError(f"its parts are nested more than {MAX_NESTING} deep")
    if not isinstance(node, ALLOWED_NODES):
        raise SecurityError(f"it has a {kind} on line {node.lineno}, which a prompt may not")
    if isinstance(node, nodes.For) and node.recursive:
        raise SecurityError(f"it has a recursive loop on line {node.lineno}")
    # Lists of lists of the same thing, written out, would double in length with every level.
    children = list(node.iter_child_nodes())
    is_list = isinstance(node, nodes.List | nodes.Tuple) and getattr(node, "ctx", "load") == "load"
    if is_list and not all(isinstance(child, nodes.Const) for child in children):
        raise SecurityError(f"its list on line {node.lineno} holds something else than constants")
    for child in children:
        _check_nodes(child, depth + 1)


class _Bounded(NodeTransformer):
    """Puts the bounds on loops and on texts that are joined by `~` into a template."""

    def visit_For(self, node: nodes.For) -> nodes.For:
        self.generic_visit(node)
        node.iter = _filter(node, "_turns", node.iter)
        return node

    def visit_Concat(self, node: nodes.Concat) -> nodes.Filter:
        self.generic_visit(node)
        parts = nodes.List(node.nodes, lineno=node.lineno, environment=node.environment)
        return _filter(node, "join", parts)


def _filter(node: nodes.Node, name: str, value: nodes.Node) -> nodes.Filter:
    """Return the part of a template that applies a filter to a value."""
    where = {"lineno": node.lineno, "environment": node.environment}
    return nodes.Filter(value, name, [], [], None, None, **where)


class _Sandbox(ImmutableSandboxedEnvironment):
    """Jinja with nothing to call but methods and filters that are allowed by name."""

    intercepted_binops = frozenset("+*%")

    def __init__(self, **options: Any):
        super().__init__(**options)
        self.globals = {"range": self.globals["range"]}
        self.filters = {name: FILTERS[name] for name in ALLOWED_FILTERS.split()} | {
            "_turns": _turns,
            "join": _join,
            "replace": _replace,
            "round": _round,
            "tojson": _tojson,
        }
        self.filters["count"] = self.filters["length"]

    def is_safe_attribute(self, obj: Any, attr: str, value: Any) -> bool:
        """Return whether the attribute is one of those that are allowed."""
        return any(
            isinstance(obj, kind) and attr in names.split()
            for kind, names in ALLOWED_METHODS.items()
        )

    def wrap_str_format(self, value: Any) -> None:
        """Leave str.format to `is_safe_attribute`, which refuses it: it can make any width."""

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        """Compute `+`, `*` or `%` where the result cannot be long."""
        if isinstance(left, int | float) and isinstance(right, int | float):
            if max(abs(left), abs(right)) > 1e100:
                raise SecurityError(f"a number in {operator} is too large")
        elif operator == "+" and type(left) is type(right) and isinstance(left, str | list):
            _check_length(len(left) + len(right))
        else:
            kinds = f"{type(left).__name__} and {type(right).__name__}"
            raise SecurityError(f"{operator} is not for {kinds}")
        return super().call_binop(context, operator, left, right)


# --- filters with bounds --------------------------------------------------------------------------

_TURNS = "turns left"
"""Where a template's context holds how often its loops may turn; no template can write the name."""


@pass_context
def _turns(context: Context, values: Iterable) -> list:
    """Return the values that a loop goes through, and take them off the turns that are left."""
    if isinstance(values, Undefined):
        values._fail_with_undefined_error()
    left = context[_TURNS]
    values = list(islice(values, left[0] + 1))
    left[0] -= len(values)
    if left[0] < 0:
        raise SecurityError(f"its loops turn more than {MAX_TURNS} times")
    return values


def _join(values: Iterable, separator: str = "") -> str:
    """Join values by a separator."""
    texts, length = [], 0
    for value in values:
        texts.append(str(value))
        length += len(texts[-1]) + len(str(separator))
        _check_length(length)
    return str(separator).join(texts)


def _replace(value: Any, old: str, new: str) -> str:
    """Replace a text within another."""
    text = str(value)
    _check_length(len(text) + text.count(old) * len(new))
    return text.replace(old, new)


def _round(value: float, digits: int = 0) -> float:
    """Round a number to some digits."""
    return round(float(value), digits)


def _tojson(value: Any) -> str:
    """Write a value as JSON on one line, every character as itself."""
    return json.dumps(value, ensure_ascii=False)


def _check_length(length: int) -> None:
    """Raise SecurityError for a text that is too long."""
    if length > MAX_TEXT:
        raise SecurityError(f"a text has more than {MAX_TEXT} characters")
