"""Numbers and findings in words, and tables, as Markdown."""

from collections.abc import Sequence

from mr1_fast.experiment.statistics import Estimate
from mr1_fast.experiment.tables import MISSING, interval, p_value, percent, signed

from .outcomes import Finding


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table; its cells hold no line breaks and no bars."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def points(difference: float) -> str:
    """A difference of shares in points, with its sign and one decimal."""
    return signed(100 * difference)


def number(value: float | None, form: str = ".3g") -> str:
    """A number in the given form, or the sign for a missing one."""
    return MISSING if value is None else format(value, form).replace("-", "−")


def accuracy(estimate: Estimate | None, seeds: int, planned: int) -> str:
    """A mean accuracy with its interval, and how many of the planned seeds it stands for."""
    if estimate is None:
        return MISSING
    spread = interval(estimate) if estimate.low < estimate.high else ""
    partly = f"({seeds} of {planned} seeds)" if seeds < planned else ""
    return " ".join(filter(None, (percent(estimate.value), spread, partly)))


def mean(estimate: Estimate | None) -> str:
    """A mean accuracy without its interval."""
    return MISSING if estimate is None else percent(estimate.value)


def ranges(numbers: Sequence[int]) -> str:
    """Whole numbers, ascending, with those that follow each other as a range."""
    parts: list[list[int]] = []
    for each in numbers:
        if parts and each == parts[-1][-1] + 1:
            parts[-1].append(each)
        else:
            parts.append([each])
    return ", ".join("–".join(map(str, dict.fromkeys((part[0], part[-1])))) for part in parts)


def _equal(p: float) -> str:
    written = p_value(p)
    return written if written.startswith("<") else f"= {written}"


def progress(finding: Finding) -> str:
    """How many seeds of a comparison are there; empty once all are."""
    if finding.complete:
        return ""
    there, planned = len(finding.differences), len(finding.question.seeds)
    return f"{there} of {planned} seeds" if there else "not run"


def short(finding: Finding) -> str:
    """The difference of a finding with interval, and whether it is shown, to stand in a line."""
    if not finding.complete:
        return progress(finding)
    test = finding.test
    found = f"{points(test.difference.value)} points {interval(test.difference)}"
    if finding.shown:
        return f"{found}, shown"
    if test.p < 0.05:
        return f"{found}, p {_equal(test.p)}, not shown after correction"
    return f"{found}, not shown, at most {100 * test.bound:.1f}"
