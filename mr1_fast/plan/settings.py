"""The settings of `python -m mr1_fast.plan`."""

from dataclasses import dataclass

from ..config import TrainConfig
from ..errors import UserError


@dataclass
class PlanConfig(TrainConfig):
    """All settings of `python -m mr1_fast.train`, and the card."""

    vram: float = 24.0
    """Memory of the GPU, in the GB of its name; of 24 GB, 23.6 GiB can be used."""

    def check(self) -> None:
        """Raise UserError for values that no run could mean."""
        super().check()
        if self.vram <= 0:
            raise UserError(f"vram is {self.vram}, but must be greater than 0.")
