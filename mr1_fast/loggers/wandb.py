"""Weights & Biases: to its server, or to wandb/ of the run folder with WANDB_MODE=offline."""

from uuid import uuid4

from .logger import PROJECT, Logger
from .samples import Sample

INIT_SECONDS = 60.0
"""How long the start of a W&B run may take, after which the logger has failed."""
FINISH_SECONDS = 20.0
"""How long W&B may upload at the end of a process; what is left can be sent by `wandb sync`.

Its package waits in a hook at exit, where no daemon thread helps, and without end by default."""


class WandbLogger(Logger):
    """Scalars, and tables of samples with images. W&B reads its own WANDB_… variables."""

    PACKAGE = "wandb"

    def open(self, first_step: int) -> None:
        """Begin a W&B run, or resume the one whose id the run folder has."""
        import wandb  # here, since it takes a second

        self.wandb = wandb
        identifier = self.run.recall("wandb") or uuid4().hex[:8]
        settings = wandb.Settings(
            console="off",  # a hook around stdout would hold up the run where W&B hangs
            init_timeout=INIT_SECONDS,
            finish_timeout=FINISH_SECONDS,
        )
        self.session = wandb.init(
            project=PROJECT,
            name=self.run.name,
            dir=str(self.run.folder),
            config=self.run.settings,
            id=identifier,
            resume="allow",
            settings=settings,
        )
        self.run.remember("wandb", identifier)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Record the metrics of a step."""
        self.session.log(metrics, step=step)

    def samples(self, samples: list[Sample], step: int) -> None:
        """Record a table of the samples."""
        table = self.wandb.Table(columns=["image", *samples[0].texts()])
        for sample in samples:
            picture = sample.picture()
            image = picture and self.wandb.Image(picture)
            table.add_data(image, *sample.texts().values())
        self.session.log({"samples": table}, step=step)

    def close(self) -> None:
        """Send what is left, and finish the run."""
        self.session.finish()
