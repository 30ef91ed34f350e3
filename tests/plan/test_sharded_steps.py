"""The memory plan of one of several processes against what a real step of it allocates."""

from dataclasses import replace

import pytest

from mr1_fast.config import TrainConfig
from mr1_fast.distributed import World
from mr1_fast.distributed.sharding import Replicated
from mr1_fast.plan.plan import make_plan

from ..data.gang import gang
from .real_steps import measure, small_config, workload

IMAGES = dict(grids=((200, 16, 16), (150, 8, 16)), lengths=(32, 24) * 4)
SEVERAL_PACKS = TrainConfig(
    device="cpu",
    dtype="float32",
    num_generations=4,
    eval_samples=0,
    recompute="all",
    tokens_per_microbatch=320,
)


def errors_of_plans(world: World, kinds: tuple[str, ...]) -> dict[str, dict[str, float]]:
    """By kind of sharding and phase, by which share a plan exceeds what a step allocates."""
    Replicated.bucket = 2**18  # gloo copies what it gathers, which should not count
    found = {}
    for kind in kinds:
        config = replace(SEVERAL_PACKS, sharding=kind)
        plan = make_plan(config, small_config(), workload(**IMAGES), processes=world.size)
        always, peaks = measure(config, small_config(), **IMAGES, choice=plan.choice, world=world)
        if kind == "full":  # its rows' memory, given up meanwhile, is older than the trace
            peaks["rollout"] -= plan.phases["rollout"]["weights"]
        found[kind] = {
            phase: (plan.total(phase) - always) / peak - 1 for phase, peak in peaks.items()
        }
    return found


@pytest.mark.slow
def test_the_plan_is_what_a_step_allocates():
    """Beside weights and states, which the plan has exactly; without those it is within 5%."""
    for found in gang(2, errors_of_plans, ("optimizer", "full"), seconds=300.0):
        for kind, errors in found.items():
            assert max(map(abs, errors.values())) < 0.05, (kind, errors)
