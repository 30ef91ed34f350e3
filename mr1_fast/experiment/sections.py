"""What the report of an experiment says, section by section, as plain data."""

from dataclasses import dataclass, field
from typing import Any

from ..evaluate.judges import NAMES
from .plots import Plot, by_value, gain_and_transfer, learning_curves, training_curves
from .results import MODES, CellResult, Results
from .tables import Table, cells, main_tables

FACTS = ("command", "date", "hardware", "model", "versions")
"""Entries of experiment.json that are listed at the end of the report."""

BARS = (
    "Accuracies are means over seeds with 95% intervals: Student's over the seeds, or Wilson's "
    "over the test items where all seeds agree. Noise, in the headline, is what paired tests with "
    "Holm's correction leave at p ≥ 0.05."
)
PUBLISHED = (
    " The paper's numbers are those of Qwen2-VL-{size}-Instruct on SuperCLEVR-200 and GeoQA. Where "
    "the model or the data are others here, compare the pattern and not the values."
)
DOTS = (
    "Up is better on the other task, and right is better on the trained one. Small dots are seeds, "
    "large ones their means; answers are greedy."
)
LINES = "Thick lines are means over seeds, thin lines are seeds."


@dataclass
class Sample:
    """A test item with what the models answered."""

    task: str
    problem: object
    solution: object
    image: str | None
    answers: list[tuple[str, object, bool]] = field(default_factory=list)
    """Of each model: what it is called, the text of its answer, and whether that is right."""


Block = Table | Plot | Sample | dict
"""A part of a section; a dict holds settings."""


@dataclass
class Section:
    """A part of the report below a heading."""

    title: str
    blocks: list[Block]
    lines: list[str] = field(default_factory=list)
    """Plain text that stands before the blocks."""


def sections(results: Results) -> list[Section]:
    """All sections that have something to show, as far as the experiment has come."""
    about = results.about
    plots = [] if about["axis"]["name"] == "method" else by_value(results)
    bars = BARS
    if about.get("paper") and not plots:
        bars += PUBLISHED.format(size=about["paper"])
    lines = [bars, *_about_judges(results)]
    found = [
        Section("Accuracy", [*main_tables(results, MODES[0]), *plots], lines),
        Section("Gain and transfer", gain_and_transfer(results), [DOTS]),
        Section(
            "Held-out accuracy during training",
            learning_curves(results),
            [f"Greedy answers to validation items. {LINES}"],
        ),
        Section("Training", training_curves(results), [LINES]),
        Section("Test items and greedy answers", _samples(results)),
        Section(
            "Accuracy of sampled answers",
            main_tables(results, MODES[1]),
            ["One answer is sampled for each item."],
        ),
        Section("Cells", [cells(results)]),
        _how_this_was_measured(about),
    ]
    return [section for section in found if section.blocks]


def _about_judges(results: Results) -> list[str]:
    """Which judge each figure is of, where some answers were judged by two."""
    if all(len(results.judges(task)) == 1 for task in results.tasks):
        return []
    line = (
        f"The same answers were counted by {' and by '.join(NAMES.values())}. Training, the "
        f"headline, the plots and the paired tests follow {NAMES[results.judge]}"
    )
    published = ", and the paper's numbers R1-V's rule" if results.about.get("paper") else ""
    return [f"{line}{published}."]


def main_plots(found: list[Section]) -> list[Plot]:
    """The first two plots of the report, which stand for it where there is room for one picture.

    They are about the two tasks that are trained, or the two that are tested.
    """
    plots = [block for section in found for block in section.blocks if isinstance(block, Plot)]
    return plots[:2]


def caption(results: Results, plots: list[Plot]) -> str:
    """What the main plots show, in one sentence."""
    match plots[0].kind:
        case "dots":
            return "Greedy accuracy on both tasks after training on one of them."
        case "values" | "names":
            label = results.about["axis"]["label"]
            return f"Accuracy over what varies ({label}), with 95% intervals."
        case _:
            return f"{plots[0].y.capitalize()} over training steps."


def _how_this_was_measured(about: dict[str, Any]) -> Section:
    tests = [
        [task, *(str(each.get(key, "")) for key in ("about", "items", "split"))]
        for task, each in about["tasks"].items()
    ]
    facts = [[name.capitalize(), _fact(about[name])] for name in FACTS if about.get(name)]
    return Section(
        "How this was measured",
        [
            Table("Test items", ["Task", "What is asked", "Items", "Split"], tests),
            Table("Run", ["", ""], facts),
            about.get("settings") or {},
        ],
        list(map(str, about.get("notes", []))),
    )


def _fact(value: object) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {version}" for name, version in value.items())
    return str(value)


def _samples(results: Results) -> list[Sample]:
    """The items that the cells of the first seed have recorded, with their answers.

    An item has the answers of the base model and of the models that are trained on its task.
    """
    found: dict[tuple, Sample] = {}
    first = [cell for cell in results.cells if cell.seed == results.about["seeds"][0]]
    for cell in first:
        for number, each in enumerate(cell.samples()):
            if cell.trained not in (None, each.get("task")):
                continue
            task, problem, solution = (str(each.get(k)) for k in ("task", "problem", "solution"))
            image = each.get("image")
            sample = found.setdefault(
                (task, number, problem, solution),
                Sample(task, problem, solution, image and str(image)),
            )
            sample.answers.append(
                (_whose(results, cell), each.get("text", ""), each.get("correct") is True)
            )
    return list(found.values())


def _whose(results: Results, cell: CellResult) -> str:
    return results.label(cell.variant) if cell.trained else f"before: {results.label(cell.variant)}"
