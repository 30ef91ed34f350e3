"""The settings of `python -m mr1_fast.evaluate`."""

from dataclasses import dataclass, field

from ..accuracy import BATCH_SIZE
from ..config import BUILT_IN, TINY, ModelConfig, TaskConfig, parse_config
from ..errors import UserError
from ..rollout.sampling import Sampling


@dataclass
class EvaluateConfig(Sampling, TaskConfig, ModelConfig):
    """All settings of `python -m mr1_fast.evaluate`."""

    temperature: float = 0.0
    """0 is greedy, as in the paper; sampling needs more than 0."""
    split: str = "test"
    """Which split of the data: train, validation or test."""
    samples: int = 200
    """How many items."""
    num_generations: int = 1
    """Completions per item, for pass@k (needs --temperature above 0)."""
    pass_at: list[int] = field(default_factory=lambda: [1])
    """The k of each pass@k to report; none above num_generations."""
    batch_size: int = BATCH_SIZE
    """Items whose prompts are held at once."""
    seed: int = 0
    """Seed of drawn items and of sampling."""
    output: str = "evaluation.json"
    """Where the figures and the record of each item go."""
    r1v_output: str | None = None
    """A second file, in the layout of R1-V's evaluation scripts, for whatever reads those."""

    def check(self) -> None:
        """Raise UserError for values that no evaluation could mean."""
        for name in ("samples", "num_generations", "batch_size", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} is {getattr(self, name)}, but must be at least 1.")
        self.check_sampling()
        if self.num_generations > 1 and self.temperature == 0:
            raise UserError(
                "num_generations is above 1, but greedy samples are all alike: set --temperature 1."
            )
        if not self.pass_at or not all(1 <= k <= self.num_generations for k in self.pass_at):
            raise UserError(
                f"pass_at is {self.pass_at}, but each k must lie in 1 … num_generations."
            )


def parse(argv: list[str]) -> EvaluateConfig:
    """Read the settings from command-line arguments; raises UserError for a bad one."""
    config = parse_config(
        EvaluateConfig, argv, prog="python -m mr1_fast.evaluate", profile=_profile
    )
    config.check()
    return config


def _profile(parsed: EvaluateConfig) -> dict:
    """Return the defaults of a built-in model."""
    return {"max_new_tokens": TINY["max_new_tokens"]} if parsed.model in BUILT_IN else {}
