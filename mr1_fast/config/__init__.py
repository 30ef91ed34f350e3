"""Every setting with its default and its help text.

YAML recipes and command-line flags are read into these classes by `command_line.py`, which shows
the text under each field in `--help`. Nothing here imports torch.
"""

from .algorithm import AlgorithmConfig
from .model import ModelConfig
from .objective import ObjectiveConfig
from .optimizer import OptimizerConfig
from .reward import RewardConfig
from .run import EVALUATION_BATCH_SIZE, RunConfig, cache_folder
from .sampling import Sampling
from .task import R1V_SUFFIX, Judging, TaskConfig, TaskName
from .train import TrainConfig

__all__ = [
    "EVALUATION_BATCH_SIZE",
    "R1V_SUFFIX",
    "AlgorithmConfig",
    "Judging",
    "ModelConfig",
    "ObjectiveConfig",
    "OptimizerConfig",
    "RewardConfig",
    "RunConfig",
    "Sampling",
    "TaskConfig",
    "TaskName",
    "TrainConfig",
    "cache_folder",
]
