"""Weights in parts on all processes (`--sharding full`): gradients, rollouts and runs of one."""

from dataclasses import replace
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh

from mr1_fast.config import TrainConfig
from mr1_fast.distributed import World
from mr1_fast.model.families import base_model
from mr1_fast.model.forward import lm_head_weight
from mr1_fast.model.fsdp import FullShards, kept_whole, whole_tensor
from mr1_fast.model.policy import Policy
from mr1_fast.optim import unbiased_accumulation
from mr1_fast.packing import MicroBatches
from mr1_fast.rollout.engine import Engine
from mr1_fast.rollout.sampling import Sampling
from mr1_fast.stages import grpo_batch_loss
from mr1_fast.types import Prompt
from tests.data.gang import gang
from tests.data.models import examples_for, fill_adapters, tiny_policy

CONFIG = TrainConfig()


def sharded(policy: Policy, world: World, block: int = 1) -> FullShards:
    return FullShards(policy.model, world, init_device_mesh("cpu", (world.size,)), block)


def group_batches(prompts: list[Prompt], groups: list[int]) -> MicroBatches:
    """Packs of some groups of two completions each, with rows that look like a rollout's."""
    generator = torch.Generator().manual_seed(3)
    lengths = [int(torch.randint(1, 7, (), generator=generator)) for _ in range(2 * len(prompts))]
    completions = [torch.randint(5, 60, (n,), generator=generator) for n in lengths]
    values = [torch.randn(4, n, generator=generator) for n in lengths]
    chosen = [2 * group + index for group in groups for index in (0, 1)]
    batches = MicroBatches([prompts[g] for g in groups], [completions[i] for i in chosen], 100)
    if chosen:
        rows = torch.cat([values[i] for i in chosen], dim=1)
        names = ("advantages", "token_weights", "rollout_logp", "ref_logp")
        batches.add_row_data(dict(zip(names, rows, strict=True)))
    return batches


def summed_gradients(
    policy: Policy, batches: MicroBatches, sharding: FullShards | None = None
) -> tuple[float, dict[str, Tensor], int]:
    """The loss of all packs, the gradients by name, and how many rows the metrics have."""
    loss, rows = 0.0, 0
    parameters = [p for p in policy.model.parameters() if p.requires_grad]
    batch_loss = partial(grpo_batch_loss, policy, beta=0.1, config=CONFIG)
    with unbiased_accumulation(parameters, seed=1):
        for batch in sharding.aligned(batches) if sharding else batches:
            work = partial(batch_loss, batch)
            part, metrics = sharding.within(work) if sharding else work()
            part.backward()
            loss += part.item()
            rows += len(metrics["rollout_gap_mean"].values)
    if sharding is None:
        return loss, {n: p.grad for n, p in policy.model.named_parameters()}, rows
    sharding.sum_gradients(seed=0)
    whole = {}
    for name, p in policy.model.named_parameters():
        whole[name] = None if p.grad is None else whole_tensor(p.grad)
    (loss,) = sharding.world.sums([loss])
    return loss, whole, int(sharding.world.sums([rows])[0])


CASES = {
    "all weights": ({}, [[0, 2], [1, 3]]),
    "recomputed": ({"recompute": "all"}, [[1, 3], [0, 2]]),
    "no image on one": ({"recompute": "all"}, [[0], [1, 2, 3]]),
    "no pack on one": ({}, [[0, 1, 2, 3], []]),
    "frozen tower": ({"freeze_vision": True, "recompute": "all"}, [[0], [1, 2, 3]]),
    "lora": ({"lora": True, "recompute": "all"}, [[0], [1, 2, 3]]),
    "own modules": ({"fused_layers": False, "recompute": "all"}, [[0, 3], [2, 1]]),
}


def compare_with_one(world: World, family: str, cases: dict) -> list[str]:
    """Compare the gradients of all cases; returns what differs."""
    differences = []
    for case, (settings, shares) in cases.items():
        alone = tiny_policy(family=family, **settings)
        policy = tiny_policy(family=family, **settings)
        for each in (alone, policy):
            if settings.get("lora"):
                torch.manual_seed(4)
                fill_adapters(each, torch.float32)
        prompts = alone.encode.many(examples_for(alone))
        everything = group_batches(prompts, [0, 1, 2, 3])
        loss, expected, rows = summed_gradients(alone, everything)

        sharding = sharded(policy, world)
        mine = group_batches(prompts, (shares + [[]])[world.rank])
        ours, gradients, our_rows = summed_gradients(policy, mine, sharding)
        if abs(ours - loss) > 1e-6 * abs(loss) or rows != our_rows:
            differences.append(f"{case}: loss {ours} of {loss}, {our_rows} rows of {rows}")
        for name, gradient in expected.items():
            if gradient is None or gradients[name] is None:
                if gradient is not gradients[name]:
                    differences.append(f"{case}: {name} is None of one")
                continue
            scale = gradient.abs().max()
            error = (gradients[name] - gradient).abs().max() / scale
            if not error < 1e-5 or not scale:
                differences.append(f"{case}: {name} {error}")
        norm = torch.stack([g.norm() for g in expected.values() if g is not None]).norm()
        if not abs(sharding.gradient_norm() / norm - 1) < 1e-6:
            differences.append(f"{case}: norm {sharding.gradient_norm()} of {norm}")
    return differences


@pytest.mark.parametrize("family", ["qwen2_vl", "qwen3_vl"])
def test_gradients_are_those_of_one_process(family):
    assert gang(2, compare_with_one, family, CASES) == [[], []]
