"""What a logger is, and what it is told about the run."""

import importlib.util
import threading
from abc import ABC, abstractmethod
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

from ..errors import UserError
from ..files import write_json
from ..report.records import json_object
from .samples import Sample

PROJECT = "mr1_fast"
"""Name of the project, or experiment, under which all runs are logged."""
COUNTS = ("steps", "evaluations")
"""What the file of identifiers has beside them: how much the loggers have from earlier processes.
"""


@dataclass
class LoggerRun:
    """A run as its loggers know it."""

    folder: Path
    """The run folder."""
    settings: dict[str, Any] = field(default_factory=dict)
    """The settings as config.yaml has them; there is no token among them."""
    resumed: bool = False
    """Whether an earlier process has begun the run."""

    def __post_init__(self):
        self._lock = threading.Lock()  # each logger has a thread of its own
        self._kept: dict[str, Any] = {}
        self.problem = ""
        """What is wrong with the file of identifiers, as a sentence; "" for nothing."""
        if self.resumed and (self._file.exists() or self._file.is_symlink()):
            try:
                self._kept = _identifiers(self._file)
            except (OSError, UserError):
                self.problem = f"{self._file} is damaged, so that loggers may begin a second entry."

    @property
    def name(self) -> str:
        """The name under which the run is shown: that of its folder."""
        return self.folder.resolve().name

    @property
    def _file(self) -> Path:
        return self.folder / "loggers.json"

    def recall(self, logger: str) -> str | None:
        """Return the identifier that a logger has given this run, or None if there is none yet."""
        return self._kept.get(logger)

    def remember(self, logger: str, identifier: str | int) -> None:
        """Keep a logger's identifier of this run, in loggers.json, for a process that resumes."""
        with self._lock:
            self._kept[logger] = identifier
            write_json(self._file, self._kept)

    def known(self, records: str, count: int) -> int:
        """Return how many "steps" or "evaluations" the loggers have from earlier processes.

        `count` is how many the last one of them has recorded; one before may have come further.
        """
        if not self.resumed:
            return 0
        known = max(count, self._kept.get(records, 0))
        self.remember(records, known)
        return known


def _identifiers(path: Path) -> dict[str, Any]:
    """Read what loggers have kept: identifiers, and counts of records."""
    if not path.is_file():
        raise UserError(f"{path} is no file: move it away.")
    kept = json_object(path.read_bytes(), path)
    for name, value in kept.items():
        is_count = type(value) is int and value >= 0
        if not (is_count or isinstance(value, str)) or (name in COUNTS and not is_count):
            raise UserError(f"{path} has a wrong value: remove it.")
    return kept


def installed(package: str) -> bool:
    """Return whether a package can be imported; a folder of its name, such as wandb/, is none."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


class Logger(ABC):
    """Somewhere that the metrics and samples of a run are sent to.

    The constructor looks for the logger's package before the run has written anything, and raises
    UserError where it is missing. All other methods are called by one thread of the logger's own,
    where they may wait, and may raise whatever they want.
    """

    REWRITES: ClassVar[bool] = False
    """Whether a resumed run replaces the records of the steps that it does again.

    Other loggers keep the first ones, and are not given those steps a second time."""

    PACKAGE: ClassVar[str]
    """The package that the logger needs."""

    def __init__(self, run: LoggerRun):
        self.run = run
        if not installed(self.PACKAGE):
            raise UserError(
                f"loggers has {self.PACKAGE}, which is not installed: pip install {self.PACKAGE}."
            )

    @abstractmethod
    def open(self, first_step: int) -> None:
        """Begin, or go on with, the run, whose next step is `first_step`."""

    @abstractmethod
    def log(self, metrics: dict[str, float], step: int) -> None:
        """Record the metrics of a step."""

    @abstractmethod
    def samples(self, samples: list[Sample], step: int) -> None:
        """Record some completions of a step, with their images where the logger has images."""

    @abstractmethod
    def close(self) -> None:
        """Send what is left, and end."""
