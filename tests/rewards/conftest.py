import pytest

from mr1_fast.rewards import registry as rewards
from mr1_fast.types import Example


@pytest.fixture
def registry(monkeypatch):
    """A copy of the registry, so that a test's rewards do not stay."""
    monkeypatch.setattr(rewards, "REWARDS", dict(rewards.REWARDS))
    return rewards.REWARDS


def row(number: int, solution: str = "3", **extra) -> Example:
    """A loaded example, which messages call `row <number> of data.jsonl`."""
    source = f"row {number} of data.jsonl"
    return Example(f"Problem {number}?", (), solution, source=source, extra=extra)
