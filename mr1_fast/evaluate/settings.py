"""The settings of `python -m mr1_fast.evaluate`."""

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..command_line import parse_settings
from ..config import EVALUATION_BATCH_SIZE, ModelConfig, Sampling, TaskConfig
from ..config.bounds import check_values
from ..errors import UserError, shortened
from ..profiles import model_defaults
from .output import require_replaceable


@dataclass
class EvaluateConfig(Sampling, TaskConfig, ModelConfig):
    """All settings of `python -m mr1_fast.evaluate`."""

    temperature: float = 0.0
    """0 is greedy, as in the paper; sampling needs more than 0."""
    split: str = "test"
    """Which split of the data: train, validation or test, or a name that the data has for one. A
    single file is taken as a whole."""
    samples: int = 200
    """How many items."""
    num_generations: int = 1
    """Completions per item, for pass@k (needs --temperature above 0)."""
    pass_at: list[int] = field(default_factory=lambda: [1])
    """The k of each pass@k to report; none above num_generations."""
    batch_size: int = EVALUATION_BATCH_SIZE
    """Items whose prompts are held at once."""
    seed: int = 0
    """Seed of drawn items and of sampling."""
    output: str = "evaluation.json"
    """Where the figures and the record of each item go; an earlier evaluation is replaced, and no
    other file."""
    r1v_output: str | None = None
    """A second file, in the layout of R1-V's evaluation scripts and judged by R1-V's rule, for
    whatever reads those."""
    explain: bool = False
    """Print for each output why the judge found it right or wrong."""

    def check(self) -> None:
        """Raise UserError for values that no evaluation could mean."""
        check_values(self)
        self.check_sampling()
        if self.data_split is not None:
            raise UserError(
                f"data_split is {shortened(self.data_split)}, but it names the split that is "
                "trained on: name the one that is evaluated with --split."
            )
        if self.num_generations > 1 and self.temperature == 0:
            raise UserError(
                "num_generations is above 1, but greedy samples are all alike: set --temperature 1."
            )
        if not self.pass_at or not all(1 <= k <= self.num_generations for k in self.pass_at):
            raise UserError(
                f"pass_at is {shortened(self.pass_at)}, but each k must lie in 1 … num_generations."
            )


def parse(argv: list[str]) -> EvaluateConfig:
    """Read the settings from the words of a command line; raises UserError for a bad one.

    A file that must not be overwritten is found here, before anything is loaded.
    """
    config = parse_settings(EvaluateConfig, argv, "python -m mr1_fast.evaluate", _profile)
    require_replaceable("output", Path(config.output))
    if config.r1v_output is not None:
        require_replaceable("r1v_output", Path(config.r1v_output))
        if Path(config.r1v_output).absolute() == Path(config.output).absolute():
            raise UserError("r1v_output and output name the same file: choose another for one.")
    return config


def _profile(config: EvaluateConfig) -> dict[str, Any]:
    """Return the defaults of a built-in model."""
    return model_defaults(config.model, config.task, config.difficulty)
