"""The settings of `python -m mr1_fast.experiment`."""

from dataclasses import dataclass, field
from typing import Any

from .. import torchrun
from ..command_line import SettingsParser
from ..config import TrainConfig
from ..config.bounds import check_values
from ..errors import UserError, shortened
from ..profiles import BUILT_IN_TEXT

TRAINING = "python -m mr1_fast.train"

FIXED = (
    *("seed", "output", "task", "data", "algo", "resume", "eval_samples", "eval_every"),
    *("keep_best", "patience", "save", "push_to_hub", "open"),
)
"""Settings of `mr1_fast.train` that an experiment decides for each of its cells.

Every cell is trained to its end, tested by the experiment itself, and leaves a whole model in its
own folder alone."""


@dataclass
class ExperimentConfig:
    """Train and test the same model with several methods, and write a report that compares them."""

    preset: str = "tiny"
    """What is compared. `tiny` (for a CPU), `small` (for any GPU), `qwen2vl_2b` and `qwen3vl_2b`
    (24 GB) compare the base model, SFT on answers and on worked solutions, GRPO and GRPO-D. An
    ending makes another study of that scale: _lever and _schedules (multiples and paths of β),
    _alpha, _beta or _generations; for `tiny` and `small` also _long (1,000 steps), _few (100
    training items) and _search (learning rates)."""
    output: str | None = None
    """Folder of the experiment; the default is experiments/<preset>. Cells that are finished there
    are kept and never run again."""
    seeds: list[int] = field(default_factory=list)
    """Seeds to train with, for example '[0, 1]'; the default is the preset's. A later call can add
    seeds to the same folder."""
    test_items: int | None = None
    """Number of test items of each task; the default is the preset's."""
    settings: dict[str, Any] = field(default_factory=dict)
    """Settings of mr1_fast.train that replace the preset's in every cell, for example
    '{"steps": 50}' or '{"model": "Qwen/Qwen2-VL-7B-Instruct"}'."""
    counting_images: str | None = None
    """Folder with the images of SuperCLEVR, for presets that test counting on them (qwen2vl_2b,
    qwen3vl_2b)."""
    geometry_images: str | None = None
    """Folder with the test images of Geo170K, for presets that test geometry on them (qwen2vl_2b,
    qwen3vl_2b)."""
    processes: int | None = None
    """How many cells run at a time, each in a process with one thread; with 1, one cell at a time
    has all threads. The default is 1 on a GPU, under torchrun and for models that are not built in,
    and otherwise the number of torch's threads (the cores, or OMP_NUM_THREADS), at most 8."""
    dry_run: bool = False
    """Print the cells with estimates of their time and memory, and run nothing."""

    def check(self) -> None:
        """Raise UserError for values that no experiment can have."""
        check_values(self)
        if (self.processes or 1) > 1 and torchrun.size() > 1:
            raise UserError(
                f"processes is {self.processes}, but torchrun has started {torchrun.size()}, which "
                "share the cells: leave it out."
            )
        if self.settings.get("model") in BUILT_IN_TEXT:
            raise UserError(
                f"settings has the model {self.settings['model']}, which reads text alone, but the "
                "presets' tasks show images: choose a model that reads them."
            )
        fixed = sorted(self.settings.keys() & set(FIXED))
        if fixed:
            raise UserError(
                f"settings has {', '.join(fixed)}, which the preset's cells decide: leave it out."
            )
        training = SettingsParser(TrainConfig, TRAINING) if self.settings else None
        for name, value in self.settings.items():
            if name not in training.kinds:
                raise UserError(
                    f"settings has {shortened(repr(name))}, which is no setting: see {TRAINING} "
                    "--help."
                )
            try:
                training.converted(name, value)
            except UserError as error:
                raise UserError(f"in settings, {error}") from error
