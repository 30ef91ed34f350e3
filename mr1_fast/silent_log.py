"""The log and report page of every process but the first, which write and print nothing."""

from pathlib import Path

from .config import TrainConfig
from .log import RunLog
from .report.live import LivePage
from .rewards import Scores
from .types import Rollout


class SilentLog(RunLog):
    """Knows the run folder as RunLog does, and neither writes nor prints."""

    def __init__(self, config: TrainConfig):
        super().__init__(config, loggers=())

    def check(self, step: int) -> None:
        """Leave the records to the first process."""

    def create(self, step: int = 0, processes: dict | None = None) -> None:
        """Leave the folder to the first process."""

    def start(self, step: int) -> None:
        """Draw no bar."""

    def step(self, step: int, metrics: dict[str, float]) -> None:
        """Record nothing."""

    def evaluation(self, record: dict) -> None:
        """Record nothing."""

    def completions(self, step: int, rollout: Rollout, scores: Scores) -> None:
        """Record nothing."""

    def say(self, text: str) -> None:
        """Print nothing."""


class NoPage(LivePage):
    """A report that is not written."""

    def __init__(self, run: Path):
        super().__init__(run, say=lambda text: None)

    def open(self) -> None:
        """Show nothing."""

    def renew(self) -> None:
        """Write nothing."""

    def finish(self) -> None:
        """Write nothing."""
