"""The kind of sharding is chosen before the model is loaded, the same on every process."""

import torch

from mr1_fast.config import TrainConfig
from mr1_fast.distributed import SINGLE, World
from mr1_fast.model.known import find_model_config
from mr1_fast.plan import choose_sharding as module
from mr1_fast.plan.choice import MARGIN
from mr1_fast.plan.choose_sharding import choose_sharding
from mr1_fast.plan.out_of_memory import MemoryLimits
from mr1_fast.plan.plan import make_plan
from mr1_fast.plan.run_memory import RunMemory
from mr1_fast.plan.sharded import Sharded
from mr1_fast.preparing import describe
from mr1_fast.run import Run

from ..data.gang import gang
from ..data.models import tiny_policy

CARDS = dict(
    model="tiny",
    prompts_per_step=2,
    max_prompt_tokens=64,
    max_new_tokens=8,
    recompute="all",
    tokens_per_microbatch=1024,
    eval_samples=0,
)


def test_one_process_shards_nothing():
    assert choose_sharding(TrainConfig(model="tiny", sharding="full", device="cpu"), SINGLE) == (
        "none"
    )


def choose(world: World, usable: list[float]) -> tuple[dict[str, str], Sharded, int, dict]:
    """What is chosen on CPUs, and on cards with so many bytes, of which there are none here."""
    tiny = dict(model="tiny", prompts_per_step=3, max_prompt_tokens=64, max_new_tokens=8)
    found = {
        kind: choose_sharding(TrainConfig(device="cpu", sharding=kind, **tiny), world)
        for kind in ("auto", "full")
    }
    memory = RunMemory(tiny_policy(), TrainConfig(**tiny), world, "optimizer")
    module.resolve_device = lambda config: torch.device("cuda")
    module.resolve_dtype = lambda config: torch.bfloat16
    module.usable_memory = lambda device, processes: usable[world.rank]
    found["cards"] = choose_sharding(TrainConfig(**CARDS), world)
    unknown = TrainConfig(**CARDS | dict(model="/nowhere/at-all"))
    found["unknown"] = choose_sharding(unknown, world)
    run = Run(TrainConfig(**tiny), tiny_policy(), MemoryLimits(print, str, {}), world)
    found["told"] = describe(run).splitlines()[0]
    return found, memory.plan.sharded, memory.plan.wires.total, memory.amounts()


def test_processes_choose_alike():
    """The card with the least memory decides, whichever process has it."""
    config = TrainConfig(**CARDS, device="cuda", sharding="optimizer")
    peak = make_plan(config, find_model_config("tiny"), processes=2).peak
    (first, *memory), second = gang(2, choose, [10 * peak, 1 + peak / (1 - MARGIN)])
    assert first == second[0]
    assert first.pop("told") == "2 processes, sharding none"
    assert first == {"auto": "none", "full": "full", "cards": "optimizer", "unknown": "optimizer"}
    sharded, wires, amounts = memory
    assert sharded == Sharded("optimizer", 2) and wires > 0
    # The process with two of three prompts, each a prompt of 64 tokens and 8 completions of 8.
    assert amounts["tokens in the rollout's KV cache"] == 1 + 2 * 64 + 16 * 8
