"""Loggers besides metrics.jsonl: TensorBoard, Weights & Biases, trackio and MLflow.

Read logger.py first: it has the interface that each of them keeps. `background.py` keeps them away
from the run: a logger that fails, hangs or is slow loses its own records, and nothing else.
"""

from .background import Background, close_all
from .logger import Logger, LoggerRun
from .mlflow import MLflowLogger
from .samples import Sample, choose_samples
from .tensorboard import TensorBoardLogger
from .trackio import TrackioLogger
from .wandb import WandbLogger

__all__ = ["LOGGERS", "Background", "Logger", "LoggerRun", "Sample", "choose_samples", "close_all"]

LOGGERS: dict[str, type[Logger]] = {
    "tensorboard": TensorBoardLogger,
    "wandb": WandbLogger,
    "trackio": TrackioLogger,
    "mlflow": MLflowLogger,
}
"""The loggers by the name that the setting `loggers` has for them."""
