"""The studies of experiments: each says what varies, and which tasks are trained."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from math import tanh
from typing import Any

from ..config.objective import ALGORITHMS
from ..profiles import PRESETS as PAPER
from .scales import ROLES


@dataclass(frozen=True)
class Variant:
    """One value of what a study varies."""

    name: str
    """Its name in the experiment's folder."""
    label: str
    """Its name in the report."""
    settings: Mapping[str, Any]
    """Settings of `mr1_fast.train` that make it."""
    by_role: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Task that is trained → further settings."""
    value: float | None = None
    """The value as a number, if it is one."""


@dataclass(frozen=True)
class Study:
    """What varies, and which tasks are trained."""

    name: str
    label: str
    """What varies, in words for the report."""
    variants: tuple[Variant, ...]
    trained: tuple[str, ...] = ROLES
    split: str = "test"
    """The split of the data that the cells are tested on."""
    seeds: tuple[int, ...] | None = None
    """Seeds that replace the scale's."""
    settings: Mapping[str, Any] = field(default_factory=dict)
    """Settings of `mr1_fast.train` that all its variants share, and that replace the scale's."""
    curve_every: int | None = None
    """Steps between the points of the learning curve, which replace the scale's."""
    drawn: bool = False
    """Whether it needs tasks whose items are drawn, without end and with a validation split."""

    @property
    def numeric(self) -> bool:
        """Whether all variants are numbers, which the report then plots along an axis."""
        return all(variant.value is not None for variant in self.variants)

    def varied(self) -> set[str]:
        """The names of all settings in which variants may differ, also by their algorithms."""
        given = {
            name
            for variant in self.variants
            for settings in (variant.settings, *variant.by_role.values())
            for name in settings
        }
        bundles = [ALGORITHMS[each.settings.get("algo", "grpo-d")] for each in self.variants]
        by_algorithm = {
            name for name in bundles[0] if len({bundle[name] for bundle in bundles}) > 1
        }
        return given | by_algorithm


def mean_beta(role: str) -> float:
    """The mean of GRPO-D's β(s) over training, with the paper's values for a task.

    β(s) is two straight lines, so its mean is that of their middles, weighted by their lengths.
    """
    low, high = _paper_range(role)
    share = PAPER[role]["explore_fraction"]
    falling, rising = ((low + high) / 2 + low) / 2, (low + high) / 2
    return share * falling + (1 - share) * rising


def _paper_range(role: str) -> tuple[float, float]:
    return PAPER[role]["beta_min"], PAPER[role]["beta_max"]


def _of_each_task(settings: Callable[[str], Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    return {role: settings(role) for role in ROLES}


def constant_beta(times: float) -> Variant:
    """GRPO whose constant β is `times` the mean of GRPO-D's."""
    return Variant(
        f"constant-x{times:g}",
        f"constant β × {times:g}",
        {"algo": "grpo"},
        _of_each_task(lambda role: {"beta": times * mean_beta(role)}),
    )


def scheduled_beta(times: float, shape: str = "grpo-d") -> Variant:
    """A path of β over the steps whose mean is `times` that of GRPO-D."""

    def settings(role: str) -> Mapping[str, Any]:
        low, high = _paper_range(role)
        scale = times * mean_beta(role) / ((low + high) / 2) if "linear" in shape else times
        return {"beta_min": scale * low, "beta_max": scale * high}

    labels = {"grpo-d": "GRPO-D", "reversed": "reversed GRPO-D"}
    label = labels.get(shape, shape.replace("-", " "))
    return Variant(
        f"{shape}-x{times:g}",
        f"{label}, β × {times:g}",
        {"algo": "grpo-d", "beta_shape": shape},
        _of_each_task(settings),
    )


def accuracy_beta(times: float, at: float) -> Variant:
    """FG-ExPO's β, which follows the accuracy, from 0.5 to 0.881 of its largest.

    At the accuracy `at` it is `times` the mean of GRPO-D's.
    """
    low, high = 0.5, (1 + tanh(1)) / 2
    there = low + (high - low) * tanh(at) / tanh(1)

    def settings(role: str) -> Mapping[str, Any]:
        scale = times * mean_beta(role) / there
        return {"beta_min": scale * low, "beta_max": scale * high}

    return Variant(
        f"accuracy-x{times:g}",
        f"by accuracy (FG-ExPO), β × {times:g}",
        {"algo": "grpo-d", "beta_shape": "accuracy"},
        _of_each_task(settings),
    )


def target_kl(times: float, target: float) -> Variant:
    """A β that holds the KL at a target, in nats per token.

    It begins at `times` the mean of GRPO-D's, and stays within a quarter and seven quarters of it.
    """

    def settings(role: str) -> Mapping[str, Any]:
        start = times * mean_beta(role)
        return {"beta_min": start / 4, "beta_max": 7 * start / 4, "target_kl": target}

    return Variant(
        f"target-kl-x{times:g}",
        f"target KL, β × {times:g}",
        {"algo": "grpo-d", "beta_shape": "target-kl"},
        _of_each_task(settings),
    )


def _numeric(name: str, label: str, sign: str, setting: str, values: tuple) -> Study:
    """A study of GRPO with several values of one setting, on geometry as in the paper's ablations.

    `sign` stands for the setting in the labels of the variants.
    """
    variants = tuple(
        Variant(
            f"{name}-{value:g}",
            f"{sign} = {value:g}",
            {"algo": "grpo", setting: value},
            value=value,
        )
        for value in values
    )
    return Study(name, label, variants, trained=("geometry",))


SFT_ANSWER = Variant("sft-answer", "SFT on answers", {"algo": "sft", "sft_target": "answer"})
SFT_SOLUTION = Variant(
    "sft-solution", "SFT on worked solutions", {"algo": "sft", "sft_target": "solution"}
)
GRPO = Variant("grpo", "GRPO", {"algo": "grpo"})
GRPO_D = Variant("grpo-d", "GRPO-D", {"algo": "grpo-d"})
NO_KL = Variant("no-kl", "GRPO, β = 0", {"algo": "grpo", "beta": 0.0})
METHODS = (SFT_ANSWER, SFT_SOLUTION, GRPO, GRPO_D)
LEARNING_RATES = (5e-5, 1e-4, 2e-4)

MULTIPLES = (1, 3, 10, 30, 100, 300)
"""How many times the paper's β the study `lever` tries."""
STRONG = 30
"""The multiple of the paper's β at which schedules are compared, chosen with the study `lever`.

It is the largest at which a constant β still leaves half of what is learnt without a KL: there the
KL weighs most without forbidding everything."""
STRONG_KL = 0.026
"""The KL that a constant β of that strength leaves on geometry, in nats per token."""

STUDIES = {
    "method": Study("method", "Method", METHODS),
    "alpha": _numeric("alpha", "Format weight α", "α", "format_weight", (0, 0.25, 0.5, 0.75, 1)),
    "beta": _numeric(
        "beta", "Constant KL weight β", "β", "beta", (0, 0.01, 0.02, 0.03, 0.04, 0.05)
    ),
    "generations": _numeric(
        "generations", "Completions per prompt G", "G", "num_generations", (4, 8, 16)
    ),
    "lever": Study(
        "lever",
        "KL weight, in multiples of the paper's",
        (
            NO_KL,
            *(make(times) for times in MULTIPLES for make in (constant_beta, scheduled_beta)),
        ),
        trained=("geometry",),
    ),
    "schedules": Study(
        "schedule",
        "KL schedule",
        (
            NO_KL,
            constant_beta(STRONG),
            *(
                scheduled_beta(STRONG, shape)
                for shape in ("grpo-d", "reversed", "linear-up", "linear-down")
            ),
            accuracy_beta(STRONG, at=0.3),
            target_kl(STRONG, STRONG_KL),
        ),
        trained=("geometry",),
    ),
    "long": Study(
        "long",
        "Method over many steps",
        (SFT_ANSWER, SFT_SOLUTION, NO_KL, constant_beta(STRONG), scheduled_beta(STRONG)),
        trained=("geometry",),
        settings={"steps": 1000, "lr_schedule": "constant", "save_every": 100},
        drawn=True,
    ),
    "few": Study(
        "few",
        "Method on 100 training items",
        (*METHODS, scheduled_beta(STRONG)),
        settings={"train_samples": 100},
        curve_every=30,
        drawn=True,
    ),
    "search": Study(
        "search",
        "Method and learning rate",
        tuple(
            Variant(
                f"{m.name}-lr{rate:g}",
                f"{m.label}, {rate:g}",
                {**m.settings, "learning_rate": rate},
            )
            for rate in LEARNING_RATES
            for m in METHODS
        ),
        split="validation",
        drawn=True,
        seeds=(100,),  # not one of those that are reported
    ),
}
