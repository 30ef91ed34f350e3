"""The presets: each is a scale (model, tasks, budget) together with a study (what varies).

`tiny`, `small` and `qwen2vl_2b` are the paper's comparison of methods. `tiny_alpha`, `small_beta`,
`qwen2vl_2b_schedules` and so on are ablations, which vary one thing. The learning rate, which the
paper and R1-V leave open for the drawn tasks, was chosen with the study `search`, and is the same
for all methods.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..config.objective import ALGORITHMS
from ..errors import UserError
from ..profiles import BUILT_IN, TINY
from ..profiles import PRESETS as PAPER

ROLES = ("counting", "geometry")
"""The paper's two tasks, visual counting and geometry reasoning.

Each scale says which task of `mr1_fast.tasks`, and which data, stand for them."""


@dataclass(frozen=True)
class Task:
    """What stands for one of the ROLES at a scale."""

    about: str
    """What is asked, in words for the report."""
    items: int
    """Number of test items."""
    train: Mapping[str, Any]
    """Settings of `mr1_fast.train` to train on it."""
    test: Mapping[str, Any]
    """Arguments of `load_examples` for the test data, without the folder of its images, which the
    user names with --counting-images and --geometry-images."""


@dataclass(frozen=True)
class Scale:
    """A model, two tasks and a budget."""

    model: str
    tasks: Mapping[str, Task]
    """Role → task."""
    settings: Mapping[str, Any]
    """Settings of `mr1_fast.train` that all cells share."""
    seeds: tuple[int, ...]
    """Seeds to run, unless the study or the user names others."""
    measured: Mapping[str, float] | None = None
    """Measured times in seconds, for --dry-run; None if nobody has measured them.

    sft, grpo:   a training step
    evaluation:  the answer to one item
    start:       the supervised start
    """
    measured_on: str = ""
    """The machine that they were measured on."""
    start_accuracy: float = 0.0
    """Sampled accuracy on both tasks at which the supervised start of a built-in model ends."""
    curve_every: int = 0
    """Steps between the points of the learning curve on validation items; 0 makes no curve."""
    curve_items: int = 200
    """Number of validation items of each task for a point of the curve."""
    paper: str = "2B"
    """Size of the model whose published numbers the report shows beside its own."""


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
    low, high, share = (PAPER[role][name] for name in ("beta_min", "beta_max", "explore_fraction"))
    falling, rising = ((low + high) / 2 + low) / 2, (low + high) / 2
    return share * falling + (1 - share) * rising


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


SFT = Variant("sft", "SFT", {"algo": "sft"})
GRPO = Variant("grpo", "GRPO", {"algo": "grpo"})
GRPO_D = Variant("grpo-d", "GRPO-D", {"algo": "grpo-d"})
METHODS = (SFT, GRPO, GRPO_D)
LEARNING_RATES = (1e-4, 2e-4, 4e-4)
STUDIES = {
    "method": Study("method", "Method", METHODS),
    "alpha": _numeric("alpha", "Format weight α", "α", "format_weight", (0, 0.25, 0.5, 0.75, 1)),
    "beta": _numeric(
        "beta", "Constant KL weight β", "β", "beta", (0, 0.01, 0.02, 0.03, 0.04, 0.05)
    ),
    "generations": _numeric(
        "generations", "Completions per prompt G", "G", "num_generations", (4, 8, 16)
    ),
    "schedules": Study(
        "schedule",
        "KL schedule",
        (
            Variant("constant", "constant, the paper's β", {"algo": "grpo"}),
            Variant(
                "constant-mean",
                "constant, the mean of GRPO-D's β(s)",
                {"algo": "grpo"},
                {role: {"beta": mean_beta(role)} for role in ROLES},
            ),
            Variant("grpo-d", "GRPO-D", {"algo": "grpo-d"}),
            *(
                Variant(shape, label, {"algo": "grpo-d", "beta_shape": shape})
                for shape, label in (
                    ("linear-up", "linear up"),
                    ("linear-down", "linear down"),
                    ("reversed", "reversed GRPO-D"),
                )
            ),
        ),
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
        seeds=(100,),  # not one of those that are reported
    ),
}


DRAWN = {**TINY, "steps": 100, "learning_rate": 2e-4, "lr_schedule": "linear"}
"""Settings to train on drawn tasks.

The preset `tiny_search` chose the learning rate. Its decay is R1-V's; without it, greedy accuracy
jumps from step to step."""


def _drawn(task: str, difficulty: int, about: str, role: str) -> Task:
    """A task whose items are drawn, with the paper's settings for `role`."""
    source = {"task": task, "data": "drawn", "difficulty": difficulty}
    return Task(about, 1000, {**source, "preset": role}, source)


SCALES = {
    "tiny": Scale(
        model="tiny",
        tasks={
            "counting": _drawn("counting", 2, "how many shapes stand in a 4×4 grid", "counting"),
            "geometry": _drawn(
                "figures", 1, "area or perimeter of a figure on a 4×4 grid", "geometry"
            ),
        },
        settings=DRAWN,
        seeds=(0, 1, 2),
        measured={"sft": 0.11, "grpo": 0.27, "evaluation": 0.003, "start": 70},
        measured_on="2 cores of a Xeon with AVX-512",
        start_accuracy=0.2,
        curve_every=20,
    ),
    "small": Scale(
        model="small",
        tasks={
            "counting": _drawn("counting", 3, "how many shapes stand in a 5×5 grid", "counting"),
            "geometry": _drawn(
                "figures", 2, "area or perimeter of a figure on a 5×5 grid", "geometry"
            ),
        },
        settings=DRAWN,
        seeds=(0, 1, 2, 3, 4),
        start_accuracy=0.2,
        curve_every=20,
    ),
    "qwen2vl_2b": Scale(
        model="Qwen/Qwen2-VL-2B-Instruct",
        tasks={
            "counting": Task(
                "SuperCLEVR-200",
                200,
                {
                    "task": "counting",
                    # Problems with R1's reasoning, so that all methods learn from the same samples.
                    "data": "MMInstruction/Clevr_CoGenT_TrainA_R1",
                    "train_samples": 100,
                    "steps": 100,
                },
                {"task": "counting", "data": "superclevr200"},
            ),
            "geometry": Task(
                "GeoQA",
                754,
                {
                    "task": "geometry",
                    # It has no reasoning, so SFT imitates the answer alone.
                    "data": "leonardPKU/GEOQA_R1V_Train_8K",
                    "sft_target": "answer",
                    "steps": 500,
                },
                {"task": "geometry", "data": "geoqa"},
            ),
        },
        settings=dict(
            optimizer="adamw_exact",
            reference="offload",
            shrink_images=True,
            save_every=25,
        ),
        seeds=(0,),
        # GRPO was measured by benchmarks/bench_memory.py and the evaluation by bench_rollout.py;
        # SFT is estimated from its tokens, which are three tenths of GRPO's.
        measured={"sft": 2.7, "grpo": 13.4, "evaluation": 0.021, "start": 0},
        measured_on="an H100 with completions of 512 tokens; a 4090 has a sixth of its bf16 rate",
    ),
}


def find_preset(name: str) -> tuple[Scale, Study]:
    """The scale and the study of a preset; UserError lists the known ones."""
    presets = known_presets()
    if name not in presets:
        raise UserError(
            f"preset is {name!r}, but the presets are {', '.join(presets)}: choose one of them."
        )
    return presets[name]


def known_presets() -> dict[str, tuple[Scale, Study]]:
    """Name → scale and study of every preset.

    The comparison of methods has the name of its scale; the others are `<scale>_<study>`. Studies
    on validation items need a built-in model, since the paper's data has no validation split.
    """
    return {
        scale_name if study_name == "method" else f"{scale_name}_{study_name}": (scale, study)
        for scale_name, scale in SCALES.items()
        for study_name, study in STUDIES.items()
        if study.split == "test" or scale.model in BUILT_IN
    }
