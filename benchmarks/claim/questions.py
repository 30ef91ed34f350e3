"""The comparisons that were fixed before any cell was run, as data.

All of them stand in one correction for their number, that of Holm. An outcome is the accuracy of
greedy or of sampled answers to the 1,000 test items, or that of greedy answers to validation items
at a step of the learning curve.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from mr1_fast.evaluate.held_out import MODES
from mr1_fast.experiment.results import BASE
from mr1_fast.experiment.scales import DRAWN, ROLES
from mr1_fast.experiment.studies import MULTIPLES, STRONG, STUDIES

TIMES = f"x{STRONG:g}"
"""How the names of variants end whose β is that of the paper times `STRONG`."""


@dataclass(frozen=True)
class Side:
    """One of the two that are compared: a variant, at the end or at a step of its curve."""

    variant: str
    step: int | None = None
    """The step of the learning curve; None stands for the test after the last step."""

    @property
    def label(self) -> str:
        """What tables call it."""
        return label(self.variant) + ("" if self.step is None else f" at step {self.step}")


@dataclass(frozen=True)
class Planned:
    """A comparison: the first side minus the second, over seeds."""

    name: str
    """Question and number, such as 1.3; 1.3s is the same of sampled answers."""
    first: Side
    second: Side
    outcome: str
    """own: accuracy on the task that was trained; other: on the task that was not."""
    trained: tuple[str, ...]
    """The tasks that are trained; of several, the mean over them is compared."""
    mode: str = "greedy"
    """Whether greedy or sampled answers are counted."""

    @property
    def on_curve(self) -> bool:
        """Whether it compares points of learning curves, and not tests."""
        return self.first.step is not None

    @property
    def where(self) -> str:
        """What is trained and tested, as short as a table needs it."""
        trained, items = self.trained, ", validation" if self.on_curve else ""
        if len(trained) > 1:
            return f"{self.outcome} task{items}"
        return f"{trained[0]} → {tested(trained[0], self.outcome)}{items}"


@dataclass(frozen=True)
class Question:
    """A question with its experiment and its comparisons."""

    number: int
    name: str
    """Its name in the names of blocks and figures."""
    title: str
    preset: str
    study: str
    """The study of the preset, whose variants its tables show."""
    seeds: tuple[int, ...]
    trained: tuple[str, ...]
    comparisons: tuple[Planned, ...]

    @property
    def variants(self) -> list[str]:
        """The names of its variants, the base model first."""
        return [BASE, *(variant.name for variant in STUDIES[self.study].variants)]


def label(variant: str) -> str:
    """What the report calls a variant of any study."""
    named = {each.name: each.label for study in STUDIES.values() for each in study.variants}
    return "base model" if variant == BASE else named[variant]


def tested(trained: str, outcome: str) -> str:
    """The task that is tested after training on another, or on it itself."""
    return trained if outcome == "own" else next(role for role in ROLES if role != trained)


@dataclass(frozen=True)
class _Pair:
    """Two sides that are compared in one or more outcomes."""

    first: str
    second: str
    outcomes: tuple[str, ...] = ("own", "other")
    steps: tuple[int | None, int | None] = (None, None)

    @property
    def modes(self) -> tuple[str, ...]:
        """How answers are counted that are compared; learning curves have greedy ones alone."""
        return MODES if self.steps == (None, None) else MODES[:1]


def _numbered(
    number: int, pairs: Sequence[_Pair], trained: Sequence[tuple[str, ...]]
) -> Iterator[Planned]:
    """Yield the comparisons of all pairs for each training, with their names."""
    each = [
        (tasks, pair, outcome) for tasks in trained for pair in pairs for outcome in pair.outcomes
    ]
    for at, (tasks, pair, outcome) in enumerate(each, start=1):
        first, second = Side(pair.first, pair.steps[0]), Side(pair.second, pair.steps[1])
        for mode in pair.modes:
            name = f"{number}.{at}{'s' if mode == 'sampled' else ''}"
            yield Planned(name, first, second, outcome, tasks, mode)


LONG_STEPS: tuple[int, int, int] = (100, 300, STUDIES["long"].settings["steps"])
"""Steps of the long runs: an early one, and the two ends of what follows."""
FEW_STEPS: tuple[int, int] = (90, DRAWN["steps"])
"""Steps of the runs on few items: early, and at the end."""

OWN, OTHER = ("own",), ("other",)
GRPO_D, CONSTANT = f"grpo-d-{TIMES}", f"constant-{TIMES}"

_TRANSFER = (
    _Pair("sft-answer", BASE, OTHER),
    _Pair("grpo-d", BASE, OTHER),
    _Pair("grpo-d", "sft-answer", ("other", "own")),
    _Pair("grpo-d", "grpo"),
    _Pair("sft-answer", "sft-solution", ("other", "own")),
)
_SHAPES = ("constant", "reversed", "linear-up", "linear-down", "accuracy", "target-kl")
_LEVER = (
    *(_Pair(GRPO_D, f"{shape}-{TIMES}") for shape in _SHAPES),
    _Pair(GRPO_D, "no-kl"),
    _Pair(CONSTANT, "no-kl"),
)
_LONG = (
    *(
        _Pair(variant, variant, OWN, LONG_STEPS[:0:-1])
        for variant in ("sft-answer", "sft-solution", "no-kl", CONSTANT, GRPO_D)
    ),
    _Pair("no-kl", "no-kl", OTHER, (LONG_STEPS[-1], 0)),
    _Pair(GRPO_D, "no-kl"),
    _Pair(GRPO_D, CONSTANT),
    *(
        _Pair(variant, "no-kl", OWN, (step, step))
        for variant in ("sft-solution", "sft-answer")
        for step in (None, LONG_STEPS[0])
    ),
)
_FEW = (
    *(
        _Pair(variant, variant, OWN, FEW_STEPS[::-1])
        for variant in ("sft-answer", "sft-solution", "grpo", "grpo-d")
    ),
    _Pair("grpo-d", "sft-answer"),
    _Pair("grpo-d", "sft-solution"),
    _Pair("grpo-d", "grpo"),
    _Pair(GRPO_D, "grpo"),
)

_EACH, _MEAN, _GEOMETRY = [(role,) for role in ROLES], [ROLES], [("geometry",)]

QUESTIONS = (
    Question(
        1, "transfer", "Transfer, and what SFT imitates", "tiny", "method",
        tuple(range(8)), ROLES, tuple(_numbered(1, _TRANSFER, _EACH)),
    ),
    Question(
        2, "lever", "The lever of β, and its schedules", "tiny_schedules", "schedules",
        tuple(range(10)), ("geometry",), tuple(_numbered(2, _LEVER, _GEOMETRY)),
    ),
    Question(
        3, "long", "Many steps", "tiny_long", "long",
        tuple(range(5)), ("geometry",), tuple(_numbered(3, _LONG, _GEOMETRY)),
    ),
    Question(
        4, "few", "Few training items", "tiny_few", "few",
        tuple(range(6)), ROLES, tuple(_numbered(4, _FEW, _MEAN)),
    ),
)  # fmt: skip

PLANNED = tuple(planned for question in QUESTIONS for planned in question.comparisons)

SCREENING, SCREENED = "tiny_lever", MULTIPLES
"""The preset that finds the multiple of β at which schedules are compared, and its multiples.

Its seeds are others than those that are reported, and nothing of it is tested."""
