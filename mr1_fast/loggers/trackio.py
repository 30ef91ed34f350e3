"""trackio: to trackio/ of the run folder, or where TRACKIO_DIR or TRACKIO_SPACE_ID says."""

import html
import os

from .logger import PROJECT, Logger
from .samples import Sample


class TrackioLogger(Logger):
    """Scalars, and tables of samples with images.

    trackio reads TRACKIO_DIR once, when a process imports it. `trackio show` needs the same folder.
    """

    PACKAGE = "trackio"

    def open(self, first_step: int) -> None:
        """Begin a trackio run, or resume that of the same name."""
        os.environ.setdefault("TRACKIO_DIR", str(self.run.folder.resolve() / "trackio"))
        import trackio  # here, since it reads TRACKIO_DIR now, and takes a second

        self.trackio = trackio
        name = self.run.recall("trackio") or self.run.name
        self.session = trackio.init(
            project=PROJECT,
            name=name,
            config=self.run.settings,
            resume="allow" if self.run.resumed else "never",
            embed=False,
        )
        self.run.remember("trackio", self.session.name)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Record the metrics of a step."""
        self.session.log(metrics, step=step)

    def samples(self, samples: list[Sample], step: int) -> None:
        """Record a table of the samples; trackio's page puts its texts into HTML as they are."""
        rows = []
        for sample in samples:
            picture = sample.picture()
            row = {"image": self.trackio.Image(picture)} if picture else {}
            for name, value in sample.texts().items():
                row[name] = html.escape(value) if isinstance(value, str) else value
            rows.append(row)
        self.session.log({"samples": self.trackio.Table(data=rows)}, step=step)

    def close(self) -> None:
        """Write what is left, and finish the run."""
        self.session.finish()
