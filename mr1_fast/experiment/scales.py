"""The scales of experiments: each is a model, two tasks and a budget.

The learning rate, which the paper and R1-V leave open for the drawn tasks, is the same for all
methods.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ..profiles import TINY

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
    has_reasoning: bool = True
    """Whether its training data have worked solutions, which SFT can imitate."""

    def can_train(self, settings: Mapping[str, Any]) -> bool:
        """Return whether its data have what a variant with these settings learns from."""
        return self.has_reasoning or settings.get("sft_target") != "solution"


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

    On a card they are those of one cell alone; elsewhere, of a cell with one thread while another
    ran beside it.
    """
    measured_on: str = ""
    """The machine that they were measured on: a card of `cards.py`, or another one in words."""
    decoding: Mapping[str, float] = field(default_factory=dict)
    """How many of these seconds go into drawing tokens one by one; for a card alone."""
    measured_how: str = ""
    """What the times are of, and what made them; for a card alone."""
    start_accuracy: float = 0.0
    """Sampled accuracy on both tasks at which the supervised start of a built-in model ends."""
    curve_every: int = 0
    """Steps between the points of the learning curve on validation items; 0 makes no curve."""
    curve_items: int = 200
    """Number of validation items of each task for a point of the curve."""
    paper: str | None = "2B"
    """Size of the model whose published numbers the report shows beside its own, if any."""


DRAWN = {**TINY, "steps": 300, "learning_rate": 1e-4, "lr_schedule": "linear"}
"""Settings to train on drawn tasks.

After 300 steps the sampled accuracy of GRPO has about doubled. Of the learning rates 1e-4 to 8e-4,
which docs/experiment/design.md compares, 1e-4 is the one with which greedy accuracy falls least at
first. Its decay is R1-V's."""


def _drawn(side: int) -> dict[str, Task]:
    """The tasks whose items are drawn on a grid, with the paper's settings for each role."""
    drawn = {
        "counting": ("counting", side - 2, "how many shapes stand in a"),
        "geometry": ("figures", side - 3, "area or perimeter of a figure on a"),
    }
    tasks = {}
    for role, (task, difficulty, about) in drawn.items():
        source = {"task": task, "data": "drawn", "difficulty": difficulty}
        tasks[role] = Task(f"{about} {side}×{side} grid", 1000, {**source, "preset": role}, source)
    return tasks


NAMED = {
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
        {"task": "geometry", "data": "leonardPKU/GEOQA_R1V_Train_8K", "steps": 500},
        {"task": "geometry", "data": "geoqa"},
        has_reasoning=False,
    ),
}
"""The paper's tasks, on the data that it names."""

FULL_24GB = dict(optimizer="adamw_exact", reference="offload", shrink_images=True, save_every=25)
"""Settings to train all weights of a model of 2B on 24 GB, which are those of the recipes."""

SCALES = {
    "tiny": Scale(
        model="tiny",
        tasks=_drawn(4),
        settings=DRAWN,
        seeds=(0, 1, 2, 3, 4),
        measured={"sft": 0.2, "grpo": 0.45, "evaluation": 0.005, "start": 200},
        measured_on="2 cores of an AMD EPYC with AVX-512",
        start_accuracy=0.2,
        curve_every=50,
    ),
    "small": Scale(
        model="small",
        tasks=_drawn(5),
        settings=DRAWN,
        seeds=(0, 1, 2, 3, 4),
        start_accuracy=0.2,
        curve_every=50,
    ),
    "qwen2vl_2b": Scale(
        model="Qwen/Qwen2-VL-2B-Instruct",
        tasks=NAMED,
        settings=FULL_24GB,
        seeds=(0,),
        # benchmarks/results/nvidia-h100-80gb-hbm3: memory_2b.json has the stages of a GRPO step,
        # and rollout.json those of an answer. SFT is estimated from its tokens, three tenths of
        # GRPO's.
        measured={"sft": 2.7, "grpo": 13.5, "evaluation": 0.04, "start": 0},
        measured_on="H100",
        decoding={"grpo": 2.5, "evaluation": 0.018},
        measured_how="of completions of 512 tokens and images of 401,408 pixels, the most that "
        "the settings allow (benchmarks/bench_memory.py, bench_rollout.py); SFT from its tokens",
    ),
    "qwen3vl_2b": Scale(
        model="Qwen/Qwen3-VL-2B-Instruct",
        tasks=NAMED,
        settings=FULL_24GB,
        seeds=(0,),
        paper=None,
    ),
}
