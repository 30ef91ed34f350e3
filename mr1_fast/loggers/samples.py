"""The completions that loggers show: a few of a step, with their images scaled down."""

from dataclasses import dataclass, fields

from PIL import Image

from ..rewards import Scores
from ..types import Rollout

PROMPTS = 4
"""Prompts of a step that are shown, each with its best and its worst completion."""
SIDE = 256
"""Longest side of an image that is shown, in pixels."""
CHARACTERS = 4_000
"""Most characters of a text that are shown."""


@dataclass(frozen=True)
class Sample:
    """One completion with what it answers and how it was rewarded."""

    key: str
    """What identifies the example."""
    problem: str
    solution: str
    completion: str
    reward: float
    parts: str
    """The value of each reward, for example `accuracy 1 · format 0`."""
    why: str
    """The reason that the judge of accuracy gave."""
    reason: str
    """Why the completion ended: `eos`, `stop` or `length`."""
    images: tuple[Image.Image, ...] = ()
    """The example's images, in full size."""

    def texts(self) -> dict[str, str | float]:
        """Return everything but the images, by name, in the order of a table's columns."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name != "images"}

    def picture(self) -> Image.Image | None:
        """Return the images side by side, each at most SIDE × SIDE pixels; None if there is none.

        It takes a millisecond or more, so loggers call it in their own thread.
        """
        if not self.images:
            return None
        small = [image.convert("RGB") for image in self.images]
        for image in small:
            image.thumbnail((SIDE, SIDE))
        sheet = Image.new("RGB", (sum(i.width for i in small), max(i.height for i in small)))
        left = 0
        for image in small:
            sheet.paste(image, (left, 0))
            left += image.width
        return sheet


def choose_samples(rollout: Rollout, scores: Scores) -> list[Sample]:
    """Return the best and the worst completion of each of the first PROMPTS prompts.

    Of several processes the first one logs, which has the images of its own prompts alone: they
    come first.
    """
    size = rollout.num_generations
    foreign = {row for row, prompt in enumerate(rollout.prompts) if prompt is None}
    rows = sorted(range(len(rollout.examples)), key=foreign.__contains__)
    chosen = []
    for row in rows[:PROMPTS]:
        example = rollout.examples[row]
        order = scores.total[row].argsort(descending=True, stable=True).tolist()
        for column in dict.fromkeys((order[0], order[-1])):
            index = row * size + column
            values = {name: part[index] for name, part in scores.parts.items()}
            said = [f"{name} {value:.4g}" for name, value in values.items() if value is not None]
            chosen.append(
                Sample(
                    key=_cut(example.key),
                    problem=_cut(example.problem),
                    solution=_cut(example.solution),
                    completion=_cut(rollout.texts[index]),
                    reward=float(scores.total[row, column]),
                    parts=" · ".join(said),
                    why=_cut(scores.why[index]),
                    reason=rollout.reasons[index],
                    images=example.images,
                )
            )
    return chosen


def _cut(text: str) -> str:
    return text if len(text) <= CHARACTERS else f"{text[:CHARACTERS]}…"
