"""MLflow: to mlflow.db of the run folder, or to the server that MLFLOW_TRACKING_URI names."""

import os
import re
import time

from ..errors import UserError
from .logger import PROJECT, Logger, LoggerRun, installed
from .samples import Sample

PARAMETERS = 100
"""Parameters that MLflow takes in one call."""


class MLflowLogger(Logger):
    """Metrics, settings as parameters, and samples as tables with images among the artifacts."""

    PACKAGE = "mlflow"

    def __init__(self, run: LoggerRun):
        super().__init__(run)
        self.on_server = bool(os.environ.get("MLFLOW_TRACKING_URI"))
        if not self.on_server and not installed("sqlalchemy"):
            raise UserError(
                "loggers has mlflow, whose database in the run folder needs more than "
                "mlflow-skinny: pip install sqlalchemy alembic, or set MLFLOW_TRACKING_URI."
            )

    def open(self, first_step: int) -> None:
        """Begin an MLflow run, or go on with the one whose id the run folder has."""
        import mlflow  # here, since it takes two seconds
        from mlflow.tracking import MlflowClient

        folder = self.run.folder.resolve()
        own = None if self.on_server else f"sqlite:///{folder / 'mlflow.db'}"
        self.mlflow, self.client = mlflow, MlflowClient(own)

        identifier = self.run.recall("mlflow")
        if identifier is None:
            files = None if self.on_server else str(folder / "mlartifacts")
            known = self.client.get_experiment_by_name(PROJECT)
            experiment = known.experiment_id if known else None
            experiment = experiment or self.client.create_experiment(PROJECT, files)
            created = self.client.create_run(experiment, run_name=self.run.name)
            identifier = created.info.run_id
            self._log_settings(identifier)
            self.run.remember("mlflow", identifier)
        else:
            self.client.update_run(identifier, status="RUNNING")
        self.identifier = identifier

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Record the metrics of a step, under names in which MLflow's path rules allow a reward."""
        now = int(time.time() * 1000)
        values = [
            self.mlflow.entities.Metric(_allowed(name), value, now, step)
            for name, value in metrics.items()
        ]
        self.client.log_batch(self.identifier, metrics=values)

    def samples(self, samples: list[Sample], step: int) -> None:
        """Record a table of the samples as an artifact of the step."""
        columns: dict[str, list] = {"image": []}
        for sample in samples:
            picture = sample.picture()
            columns["image"].append(self.mlflow.Image(picture) if picture else None)
            for name, value in sample.texts().items():
                columns.setdefault(name, []).append(value)
        self.client.log_table(self.identifier, columns, f"samples/step-{step:06d}.json")

    def close(self) -> None:
        """End the run."""
        self.client.set_terminated(self.identifier)

    def _log_settings(self, identifier: str) -> None:
        """Record the settings as parameters, whose values MLflow limits in length."""
        parameter = self.mlflow.entities.Param
        settings = [parameter(name, str(v)[:500]) for name, v in self.run.settings.items()]
        for start in range(0, len(settings), PARAMETERS):
            self.client.log_batch(identifier, params=settings[start : start + PARAMETERS])


def _allowed(name: str) -> str:
    """Return a metric's name without what MLflow refuses, such as the start of a file's path."""
    return re.sub(r"[^\w\-./: ]", "_", name).replace("..", "_").strip("/.")
