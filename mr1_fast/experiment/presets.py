"""What is compared, at which scale: a preset is a scale (model, tasks, budget) and a study (what varies).

`tiny`, `small` and `qwen2vl_2b` are the paper's comparison; `tiny_alpha`, `small_beta`, `qwen2vl_2b_schedules` and so
on vary one thing. What the paper and R1-V leave open is chosen once, by the study `search`, for all methods alike.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..config import BUILT_IN, TINY
from ..config import PRESETS as PAPER
from ..errors import UserError

ROLES = ("counting", "geometry")
"""The paper's two tasks, visual counting and geometry reasoning, whatever stands for them at a scale."""


@dataclass(frozen=True)
class Task:
    """What stands for one of the roles."""

    about: str
    items: int
    """Test items."""
    train: Mapping[str, Any]
    """Settings of `mr1_fast.train` for training on it."""
    test: Mapping[str, Any]
    """Settings that name the test data; the folder of its images is the user's to say (`--counting-images`)."""


@dataclass(frozen=True)
class Scale:
    """A model, two tasks and a budget."""

    model: str
    tasks: Mapping[str, Task]
    settings: Mapping[str, Any]
    """Settings of `mr1_fast.train` that all cells share."""
    seeds: tuple[int, ...]
    measured: Mapping[str, float] | None = None
    """Seconds: of a training step by algorithm, of an item's evaluation, of the start. For `--dry-run`; None where
    nobody has measured them."""
    measured_on: str = ""
    start_accuracy: float = 0.0
    """Built-in models: sampled accuracy on both tasks at which their supervised start ends."""
    curve_every: int = 0
    """Steps between the points of the learning curve on validation items; 0: none."""
    curve_items: int = 200
    paper: str = "2B"
    """Which of the published tables stands beside ours."""


@dataclass(frozen=True)
class Variant:
    """One value of what a study varies."""

    name: str
    label: str
    settings: Mapping[str, Any]
    by_role: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """Settings that depend on the task that is trained."""
    value: float | None = None


@dataclass(frozen=True)
class Study:
    """What varies, and which tasks are trained."""

    name: str
    label: str
    variants: tuple[Variant, ...]
    trained: tuple[str, ...] = ROLES
    split: str = "test"
    """Which drawn items the cells are tested on."""
    seeds: tuple[int, ...] | None = None
    """In the place of the scale's."""

    @property
    def numeric(self) -> bool:
        """Whether the variants are values on a number line."""
        return all(variant.value is not None for variant in self.variants)


def mean_beta(role: str) -> float:
    """The mean of the paper's β(s) for a task: two straight lines, weighted by their lengths."""
    low, high, share = (PAPER[role][name] for name in ("beta_min", "beta_max", "explore_fraction"))
    return share * ((low + high) / 2 + low) / 2 + (1 - share) * (low + high) / 2


def _numeric(name: str, label: str, sign: str, setting: str, values: tuple, **shared: Any) -> Study:
    variants = tuple(
        Variant(
            f"{name}-{value:g}",
            f"{sign} = {value:g}",
            {"algo": "grpo", setting: value, **shared},
            value=value,
        )
        for value in values
    )
    return Study(name, label, variants, trained=("geometry",))  # as in the paper's ablations


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
        seeds=(100,),  # none that is reported
    ),
}


DRAWN = {**TINY, "steps": 100, "learning_rate": 2e-4, "lr_schedule": "linear"}
"""Settings for drawn tasks. The learning rate is what tiny_search chose; its decay is R1-V's, and greedy accuracy jumps
from step to step without it."""


def _drawn(task: str, difficulty: int, about: str, role: str, **train: Any) -> Task:
    source = {"task": task, "data": "drawn", "difficulty": difficulty}
    return Task(about, 1000, {**source, "preset": role, **train}, source)


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
                    "data": "leonardPKU/GEOQA_R1V_Train_8K",  # has no reasoning: SFT imitates the answer
                    "sft_target": "answer",
                    "steps": 500,
                },
                {"task": "geometry", "data": "geoqa"},
            ),
        },
        settings=dict(
            optimizer="adamw_exact",
            reference="offload",
            tokens_per_microbatch=6144,
            shrink_images=True,
            save_every=25,
        ),
        seeds=(0,),
        # GRPO by benchmarks/bench_memory.py, evaluation by bench_rollout.py; SFT has three tenths of GRPO's tokens.
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
    """Every preset by its name: a scale's for the comparison of methods, `<scale>_<study>` for the others."""
    return {
        scale_name if study_name == "method" else f"{scale_name}_{study_name}": (scale, study)
        for scale_name, scale in SCALES.items()
        for study_name, study in STUDIES.items()
        if study.split == "test"
        or scale.model in BUILT_IN  # the paper's data has no validation split
    }
