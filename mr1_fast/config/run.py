"""Settings of a run: what it writes, when it evaluates, and when it ends."""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ..errors import UserError

EVALUATION_BATCH_SIZE = 64
"""Items whose prompts an evaluation holds in memory at once unless told otherwise."""


@dataclass
class RunConfig:
    """Where the run writes its results, and how often."""

    output: str | None = None
    """Folder of the run, which must be new; by default runs/<time>-<task>-<algo>-seed<seed>."""
    resume: str | None = None
    """Folder of an earlier run, to continue from its last checkpoint with the settings of its
    config.yaml; `auto` continues the one in --output if that has a checkpoint, and begins there
    otherwise, so that one command line can be started again and again."""
    sharding: Literal["auto", "none", "optimizer", "full"] = "auto"
    """What each of several processes under `torchrun` holds a part of: nothing (none), the
    optimizer's state (optimizer), or the weights, too (full). `auto` is none, or optimizer where
    that leaves memory to compute less again, and full only if neither fits, by the plan."""
    seed: int = 0
    """Seed of everything random: the same seed gives the same numbers on the same machine."""
    save_every: int = 50
    """Steps between checkpoints; 0 saves none, unless the run is stopped before its end."""
    save: Literal["merged", "adapter", "both"] | None = None
    """What a run with --lora leaves in final/: the merged model, the adapter in final/adapter, or
    both. By default the merged model, and over 4-bit weights the adapter, which
    `python -m mr1_fast.merge` merges into the 16-bit model."""
    push_to_hub: str | None = None
    """Name on the Hugging Face Hub, such as me/my-model, that final/ is uploaded to with its model
    card; it is created as a public repository unless it exists, and checked before training. Log in
    first with `hf auth login`."""
    max_hours: float | None = None
    """Hours within which the run saves, writes its report and ends; --resume goes on from there,
    with as many hours again."""
    open: bool = False
    """Open the live report in a browser once training begins."""
    eval_samples: int = 200
    """Number of held-out items that are evaluated before and after training; 0 skips evaluation."""
    eval_every: int = 0
    """Steps between greedy evaluations of the held-out items during training, which go to
    evaluations.jsonl; 0 is off."""
    keep_best: bool = False
    """Make final/ of the weights with the highest accuracy of all evaluations, the earliest of
    equal ones, and not of the last weights; needs --eval-every."""
    patience: int = 0
    """Evaluations in a row without a higher accuracy after which training ends; 0 is off."""
    eval_data: str | None = None
    """Held-out data: like --data, or one of the test sets superclevr200 and geoqa, which need
    --image-root; by default the test split of --data."""
    eval_split: str | None = None
    """Name of the split that is held out, such as validation; by default test, or validation where
    there is no test split. A file that --eval-data names is held out as a whole."""
    loggers: list[Literal["tensorboard", "wandb", "trackio", "mlflow"]] = field(
        default_factory=list
    )
    """Loggers that get the metrics and some samples besides the run folder, for example
    '[tensorboard]'."""

    def check_run(self) -> None:
        """Raise UserError for settings that need one another."""
        for name in ("keep_best", "patience"):
            if getattr(self, name) and not (self.eval_every and self.eval_samples):
                raise UserError(
                    f"{name} is set, but nothing is evaluated during training: pass --eval-every "
                    "and --eval-samples, or leave it out."
                )
        if self.max_hours is not None and self.max_hours <= 0:
            raise UserError(f"max_hours is {self.max_hours}, but must be greater than 0.")


def cache_folder() -> Path:
    """Return the folder of the built-in models' supervised starts and of downloaded images.

    It is $MR1_FAST_CACHE, or mr1_fast in $XDG_CACHE_HOME, or mr1_fast in ~/.cache. Raises UserError
    where there is none of these.
    """
    if named := os.environ.get("MR1_FAST_CACHE"):
        return Path(named)
    if base := os.environ.get("XDG_CACHE_HOME"):
        return Path(base) / "mr1_fast"
    try:
        return Path.home() / ".cache" / "mr1_fast"
    except RuntimeError as error:
        raise UserError(
            "there is no home folder to keep files in: set MR1_FAST_CACHE to a folder."
        ) from error
