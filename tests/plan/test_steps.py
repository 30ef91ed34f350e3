"""The memory plan equals what real steps allocate, phase by phase, in every kind of family."""

from dataclasses import replace

import pytest
import torch

from mr1_fast.config import TrainConfig
from mr1_fast.model.families import vision_tower
from mr1_fast.plan.choice import MARGIN
from mr1_fast.plan.layers import nbytes
from mr1_fast.plan.plan import Plan, make_plan

from .real_steps import TOWERS, measure, small_config, small_model, workload

IMAGES = dict(grids=((200, 16, 16), (150, 8, 16)), lengths=(32, 24) * 4)
LONG = dict(grids=((120, 8, 8), (100, 4, 8)), lengths=(32, 24) * 8)
QWEN3_VL, QWEN3 = dict(family="qwen3_vl"), dict(family="qwen3")
CASES = {
    "recomputed": (IMAGES, dict(recompute="all"), {}),
    "stored": (IMAGES, dict(recompute="none"), {}),
    "transformers' layers, recomputed": (IMAGES, dict(recompute="all", fused_layers=False), {}),
    "transformers' layers, stored": (IMAGES, dict(recompute="none", fused_layers=False), {}),
    "frozen vision": (IMAGES, dict(freeze_vision=True), {}),
    "stored, 8-bit reference": (IMAGES, dict(recompute="none", reference="8bit"), {}),
    "lora, stored": (IMAGES, dict(lora=True, recompute="none"), {}),
    "lora bf16": (IMAGES, dict(lora=True, dtype="bfloat16", recompute="all"), {}),
    "exact bf16, several packs": (
        IMAGES,
        dict(tokens_per_microbatch=320, dtype="bfloat16", recompute="all"),
        dict(vocab_size=3000),
    ),
    "stochastic bf16, cache": (
        LONG,
        dict(optimizer="adamw_stochastic", dtype="bfloat16", recompute="all"),
        dict(vocab_size=8_000),
    ),
    "top_p, untied": (
        LONG,
        dict(top_p=0.9, recompute="none"),
        dict(vocab_size=8_000, tied=False),
    ),
    "a loss in two passes": (
        LONG,
        dict(ratio="sequence", entropy_coefficient=0.1, recompute="none"),
        dict(vocab_size=8_000),
    ),
    "Qwen2.5-VL, windows, stored": (
        IMAGES,
        dict(recompute="none"),
        dict(family="qwen2_5_vl"),
    ),
    "Qwen2.5, recomputed": (LONG, dict(recompute="all"), dict(family="qwen2")),
    "Qwen3-VL, recomputed": (IMAGES, dict(recompute="all"), QWEN3_VL),
    "Qwen3-VL, stored": (IMAGES, dict(recompute="none"), QWEN3_VL),
    "Qwen3-VL, transformers' layers, stored": (
        IMAGES,
        dict(recompute="none", fused_layers=False),
        QWEN3_VL,
    ),
    "Qwen3-VL, frozen vision": (IMAGES, dict(freeze_vision=True), QWEN3_VL),
    "Qwen3-VL, lora bf16": (
        IMAGES,
        dict(lora=True, dtype="bfloat16", recompute="all"),
        QWEN3_VL,
    ),
    "Qwen3-VL, 8-bit reference, several packs": (
        IMAGES,
        dict(tokens_per_microbatch=320, reference="8bit", recompute="none"),
        QWEN3_VL,
    ),
    "Qwen3, stored": (LONG, dict(recompute="none"), QWEN3),
    "Qwen3, recomputed, untied": (LONG, dict(recompute="all"), QWEN3 | dict(tied=False)),
    "Qwen3, lora bf16": (LONG, dict(lora=True, dtype="bfloat16", recompute="none"), QWEN3),
}


def bounded(config: TrainConfig, shapes: dict, sizes: dict, plan: Plan) -> None:
    """Assert that a plan is what a step allocates that does as the plan has chosen."""
    always, measured = measure(config, small_config(**sizes), **shapes, choice=plan.choice)
    errors = {phase: plan.total(phase) / (always + measured[phase]) - 1 for phase in measured}
    beside = {phase: (plan.total(phase) - always) / measured[phase] - 1 for phase in measured}
    print(
        {
            phase: (measured[phase], f"{errors[phase]:+.1%}", f"{beside[phase]:+.1%}")
            for phase in measured
        }
    )
    assert max(map(abs, errors.values())) < 0.05, errors
    work_space = 0.25 if config.dtype == "bfloat16" else 0.06  # oneDNN lays 16-bit numbers out anew
    assert max(map(abs, beside.values())) < work_space, beside


@pytest.mark.parametrize("case", CASES)
def test_the_plan_is_what_a_step_allocates(case):
    shapes, settings, sizes = CASES[case]
    generations = len(shapes["lengths"]) // len(shapes["grids"])
    fixed = dict(device="cpu", dtype="float32", num_generations=generations, eval_samples=0)
    config = TrainConfig(**{**fixed, **settings})
    has_images = sizes.get("family", "qwen2_vl") in TOWERS
    plan = make_plan(config, small_config(**sizes), workload(**shapes, has_images=has_images))
    bounded(config, shapes, sizes, plan)


@pytest.mark.parametrize("fused", [True, False], ids=["fused", "transformers"])
@pytest.mark.parametrize("share", [0.15, 0.5, 0.85])
def test_auto_keeps_what_fits_and_the_plan_is_what_a_step_allocates(share, fused):
    config = TrainConfig(
        device="cpu", dtype="float32", num_generations=4, eval_samples=0, fused_layers=fused
    )
    work = workload(**IMAGES)
    most, least = (
        make_plan(replace(config, recompute=value), small_config(), work).total("update")
        for value in ("none", "all")
    )
    limit = least + share * (most - least)
    plan = make_plan(config, small_config(), work, usable=limit / (1 - MARGIN))
    recomputed = plan.choice.recomputed
    assert 0 < recomputed.text + recomputed.vision < 8
    assert least < plan.total("update") <= limit
    bounded(config, IMAGES, {}, plan)


def test_a_frozen_vision_tower_takes_less():
    config = TrainConfig(device="cpu", num_generations=4, eval_samples=0)
    before, after = (
        make_plan(replace(config, freeze_vision=frozen), small_config(), workload(**IMAGES))
        for frozen in (False, True)
    )
    vision = vision_tower(small_model(small_config()))
    size = nbytes(vision, trainable=True)
    states = [plan.phases["update"]["optimizer"] for plan in (before, after)]
    assert states[0] - states[1] == 2 * size
    assert after.choice.layers.vision == 0 and "vision" not in str(after.choice)
    assert after.total("update") < before.total("update") - 2 * size


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize(
    "settings", [{}, {"lora": True}, {"reference": "offload", "offload_checkpoints": True}], ids=str
)
def test_the_plan_is_what_cuda_allocates(settings):
    config = TrainConfig(
        **{
            "device": "cuda",
            "dtype": "bfloat16",
            "num_generations": 4,
            "eval_samples": 0,
            **settings,
        }
    )
    plan = make_plan(config, small_config(), workload(**IMAGES))
    always, measured = measure(config, small_config(), **IMAGES, choice=plan.choice)
    tensors = {phase: plan.total(phase) - plan.phases[phase]["workspace"] for phase in measured}
    if config.reference == "offload":  # measured in host memory, where the plan has nothing
        always = sum(
            plan.phases["rollout"].get(name, 0) for name in ("weights", "remainder", "optimizer")
        )
    errors = {phase: tensors[phase] / (always + measured[phase]) - 1 for phase in measured}
    assert max(map(abs, errors.values())) < 0.07, errors
