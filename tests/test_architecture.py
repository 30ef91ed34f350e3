"""Who imports whom: no circle, and no import of a higher floor. No constant has two values."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mr1_fast"
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
PAGE = ROOT / "docs" / "architecture.md"


def floors() -> dict[str, int]:
    """The floor of each part of the package, from the one list, which the documentation has."""
    block = PAGE.read_text(encoding="utf-8").partition("```\nfloors\n")[2].partition("```")[0]
    return {name: floor for floor, line in enumerate(block.splitlines()) for name in line.split()}


FLOORS = floors()


def imports_of(module: str) -> Iterator[str]:
    """The files of the package that a file imports, inside functions and conditions, too."""
    package = module.rpartition(".")[0]
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parts = package.split(".") if node.level else []
            start = ".".join(parts[: len(parts) - node.level + 1] if node.level else [])
            target = ".".join(filter(None, (start, node.module)))
            found = [f"{target}.{alias.name}" for alias in node.names]
        else:
            continue
        for name in found:
            yield from known_file(name)


def known_file(name: str) -> Iterator[str]:
    """The file behind an imported name: a module, or the one that defines the name."""
    for candidate in (name, f"{name}.__init__", name.rpartition(".")[0]):
        if candidate in FILES:
            yield candidate
            return
    if (package := f"{name.rpartition('.')[0]}.__init__") in FILES:
        yield package


EDGES = {module: sorted(set(imports_of(module)) - {module}) for module in FILES}


def circle(edges: dict[str, list[str]]) -> list[str]:
    """A circle of a graph, as the names along it; empty where there is none."""
    finished: set[str] = set()

    def visit(node: str, path: list[str]) -> list[str]:
        if node in path:
            return [*path[path.index(node) :], node]
        if node in finished:
            return []
        for other in edges.get(node, ()):
            if found := visit(other, [*path, node]):
                return found
        finished.add(node)
        return []

    for node in edges:
        if found := visit(node, []):
            return found
    return []


def within(folder: str) -> dict[str, list[str]]:
    """The imports among the parts of a package: its files, and its sub-packages each as one."""

    def part(module: str) -> str | None:
        inside = module.startswith(folder + ".")
        return module.removeprefix(folder + ".").split(".")[0] if inside else None

    edges: dict[str, set[str]] = {}
    for module, others in EDGES.items():
        if part(module):
            found = edges.setdefault(part(module), set())
            found.update(part(other) for other in others if part(other) not in (None, part(module)))
    return {name: sorted(others) for name, others in edges.items()}


def test_imports_are_found_in_every_form():
    assert (
        "mr1_fast.kernels.grpo.rows_triton" in EDGES["mr1_fast.kernels.grpo.rows"]
    )  # in a function
    assert "mr1_fast.tasks.__init__" in EDGES["mr1_fast.tasks.data.examples"]  # from . import
    assert "mr1_fast.types" in EDGES["mr1_fast.train"]
    assert circle({"a": ["b"], "b": ["c"], "c": ["b"]}) == ["b", "c", "b"]
    assert circle({"a": ["b", "c"], "b": ["c"], "c": []}) == []


def test_no_file_imports_itself_in_a_circle():
    assert circle(EDGES) == []


@pytest.mark.parametrize(
    "folder",
    sorted({".".join(path.parent.relative_to(ROOT).parts) for path in FILES.values()}),
)
def test_no_package_has_a_circle_among_its_parts(folder):
    assert circle(within(folder)) == []


def test_every_part_has_one_floor():
    parts = {name for name in within("mr1_fast") if not name.startswith("__")}
    assert parts == FLOORS.keys()


@pytest.mark.parametrize("name", sorted(FLOORS))
def test_a_part_imports_lower_floors_alone(name):
    higher = [
        other
        for other in within("mr1_fast")[name]
        if not other.startswith("__") and FLOORS[other] >= FLOORS[name]
    ]
    assert higher == []


@pytest.mark.parametrize("module", FILES)
def test_no_constant_of_a_file_is_given_two_values(module):
    """The second one would count for both, which no linter tells."""
    statements = ast.parse(FILES[module].read_text(encoding="utf-8")).body
    assigned = [node for node in statements if isinstance(node, ast.Assign | ast.AnnAssign)]
    targets = [getattr(node, "targets", None) or [node.target] for node in assigned]
    names = [each.id for group in targets for each in group if isinstance(each, ast.Name)]
    constants = [name for name in names if name.isupper()]
    assert len(constants) == len(set(constants))
