"""A judge whose verdicts change from step to step, though a fresh model never answers right."""

from zlib import crc32

import pytest

from mr1_fast import tasks
from mr1_fast.rewards.answers.verdict import Verdict


def toss(output: str, solution: str, untagged: bool = False) -> Verdict:
    """A verdict that only the two texts decide."""
    return Verdict(crc32(f"7 {output} {solution}".encode()) % 3 == 0, "by its checksum")


@pytest.fixture
def tossing(monkeypatch):
    """The accuracy of a run goes up and down, and is the same wherever its outputs are."""
    monkeypatch.setattr(tasks, "judge_completion", toss)
