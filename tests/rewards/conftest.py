import pytest

from mr1_fast.rewards import registry as rewards


@pytest.fixture
def registry(monkeypatch):
    """A copy of the registry, so that a test's rewards do not stay."""
    monkeypatch.setattr(rewards, "REWARDS", dict(rewards.REWARDS))
    return rewards.REWARDS
