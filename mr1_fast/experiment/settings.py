"""The settings of `python -m mr1_fast.experiment`."""

from dataclasses import dataclass, field
from typing import Any

from ..errors import UserError


@dataclass
class ExperimentConfig:
    """All settings of `python -m mr1_fast.experiment`."""

    preset: str = "tiny"
    """tiny (a CPU), small (any GPU) or qwen2vl_2b (24 GB) compare the methods. With an ending: _alpha, _beta,
    _generations, _schedules vary one thing; tiny_search and small_search the learning rate of every method."""
    output: str | None = None
    """Folder of the experiment; what is finished there is kept and never run again. Default: experiments/<preset>."""
    seeds: list[int] = field(default_factory=list)
    """Seeds to run, for example '[0, 1]'; default: the preset's. More can be added later."""
    test_items: int | None = None
    """Test items of each task; default: the preset's."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of mr1_fast.train for every cell, over the preset's, for example '{"steps": 50}' or another model."""
    counting_images: str | None = None
    """Folder with SuperCLEVR's images, for presets that test on them."""
    geometry_images: str | None = None
    """Folder with Geo170K's test images, for presets that test on them."""
    dry_run: bool = False
    """Print the cells with an estimate of their time and memory, and run nothing."""

    def check(self) -> None:
        """Raise UserError for values that no experiment could mean."""
        if self.test_items is not None and self.test_items < 1:
            raise UserError(f"test_items is {self.test_items}, but must be at least 1.")
        if len(set(self.seeds)) != len(self.seeds) or any(seed < 0 for seed in self.seeds):
            raise UserError(f"seeds is {self.seeds}, but must be different numbers, none negative.")
        fixed = {
            "seed",
            "output",
            "task",
            "data",
            "algo",
            "resume",
            "eval_samples",
        } & self.settings.keys()
        if fixed:
            raise UserError(
                f"settings has {', '.join(sorted(fixed))}, which the preset's cells decide: leave it out."
            )
