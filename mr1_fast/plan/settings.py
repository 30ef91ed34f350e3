"""The settings of `python -m mr1_fast.plan`."""

from dataclasses import dataclass

from ..command_line import parse_settings
from ..config import TrainConfig
from ..config.train import check_sharding
from ..errors import UserError
from ..profiles import profile_defaults


@dataclass
class PlanConfig(TrainConfig):
    """Whether a run fits on a card: all settings of `python -m mr1_fast.train`, and the card."""

    vram: float = 24.0
    """Memory of each GPU, in the GB of its name; 23.6 GiB of a card with 24 GB can be used."""
    gpus: int = 1
    """GPUs that train together, each by a process that `torchrun` starts; --sharding says what each
    of them holds."""

    def check(self) -> None:
        """Raise UserError for values that cannot be used."""
        super().check()
        if self.prompts_per_step < self.gpus:
            raise UserError(
                f"prompts_per_step is {self.prompts_per_step}, but each of {self.gpus} GPUs needs "
                "a prompt: raise --prompts-per-step or lower --gpus."
            )
        if self.gpus > 1:
            check_sharding(self)


def parse(argv: list[str]) -> PlanConfig:
    """Read the settings from the words of a command line; raises UserError for a bad one."""
    return parse_settings(PlanConfig, argv, "python -m mr1_fast.plan", profile_defaults)
