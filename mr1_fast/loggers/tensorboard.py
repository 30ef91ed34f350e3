"""TensorBoard: an event file under tensorboard/ of the run folder."""

import numpy as np

from .logger import Logger
from .samples import Sample


class TensorBoardLogger(Logger):
    """Scalars, samples as text, and their images."""

    REWRITES = True  # TensorBoard hides what stands before `purge_step` with a later step

    PACKAGE = "tensorboard"

    def open(self, first_step: int) -> None:
        """Open an event file, in place of the steps from `first_step` on in earlier ones."""
        from torch.utils.tensorboard import SummaryWriter  # here, since it takes a second

        purge = first_step if self.run.resumed else None
        self.writer = SummaryWriter(str(self.run.folder / "tensorboard"), purge_step=purge)

    def log(self, metrics: dict[str, float], step: int) -> None:
        """Record a scalar for each metric."""
        for name, value in metrics.items():
            self.writer.add_scalar(name, value, step)

    def samples(self, samples: list[Sample], step: int) -> None:
        """Record each sample as a text, and the picture of each prompt."""
        self.writer.add_text("samples", "\n\n".join(map(_markdown, samples)), step)
        for number, sample in enumerate({s.key: s for s in samples}.values(), 1):
            if picture := sample.picture():
                tag = f"samples/prompt {number}"
                self.writer.add_image(tag, np.asarray(picture), step, dataformats="HWC")

    def close(self) -> None:
        """Write what is left, and close the file."""
        self.writer.close()


def _markdown(sample: Sample) -> str:
    """Write a sample in Markdown; indented lines stand in it as they are, whatever they hold."""
    said = "".join(f"\n    {name}: {text}" for name, text in _lines(sample))
    return f"**reward {sample.reward:.4g}**\n{said}"


def _lines(sample: Sample):
    for name, value in sample.texts().items():
        if name != "reward":
            yield name, "\n    ".join(str(value).splitlines())
