"""Weights in parts on all processes (`--sharding full`): the gradients and rollouts of one."""

from functools import partial
from unittest.mock import patch

import pytest
import torch
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from mr1_fast.config import TrainConfig
from mr1_fast.distributed import World
from mr1_fast.distributed.sharding import local
from mr1_fast.errors import UserError
from mr1_fast.model.fsdp import FullShards, kept_whole
from mr1_fast.model.policy import Policy
from mr1_fast.model.reference import Reference
from mr1_fast.model.spread import spread
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
    whole = whole_gradients(policy, sharding)
    (loss,) = sharding.world.sums([loss])
    return loss, whole, int(sharding.world.sums([rows])[0])


def whole_gradients(policy: Policy, sharding: FullShards) -> dict[str, Tensor | None]:
    """The gradients of all parts, put together."""
    found = {name: None for name, _ in policy.model.named_parameters()}
    mine = [(part.name, part.first, part.weight.grad) for part in sharding.parts]
    pieces: dict[str, dict[int, Tensor]] = {}
    for parts in sharding.world.gather(mine):
        for name, first, gradient in parts:
            if gradient is not None:
                pieces.setdefault(name, {})[first] = gradient
    for name, of_name in pieces.items():
        found[name] = torch.cat([of_name[first] for first in sorted(of_name)])
    shapes = {name: p.shape for name, p in policy.model.named_parameters()}
    return {name: g if g is None else g.view(shapes[name]) for name, g in found.items()}


CASES = {
    "all weights": ({}, [[0, 2], [1, 3]]),
    "recomputed": ({"recompute": "all"}, [[1, 3], [0, 2]]),
    "no image on one": ({"recompute": "all"}, [[0], [1, 2, 3]]),
    "no pack on one": ({}, [[0, 1, 2, 3], []]),
    "frozen tower": ({"freeze_vision": True, "recompute": "all"}, [[0], [1, 2, 3]]),
    "lora": ({"lora": True, "recompute": "all"}, [[0], [1, 2, 3]]),
    "several packs in bf16": ({"dtype": torch.bfloat16}, [[0, 3], [2, 1]]),
    "own modules": ({"fused_layers": False, "recompute": "all"}, [[0, 3], [2, 1]]),
}

DEEPSTACK = {name: CASES[name] for name in ("recomputed", "no image on one", "no pack on one")}


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

        # Packs of a process round differently in bf16, so the sizes are compared alone.
        exact, close = (2e-2, torch.inf) if settings.get("dtype") else (1e-6, 1e-5)
        sharding = sharded(policy, world)
        mine = group_batches(prompts, [*shares, []][world.rank])
        ours, gradients, our_rows = summed_gradients(policy, mine, sharding)
        if abs(ours - loss) > exact * abs(loss) or rows != our_rows:
            differences.append(f"{case}: loss {ours} of {loss}, {our_rows} rows of {rows}")
        for name, gradient in expected.items():
            if gradient is None or gradients[name] is None:
                if gradient is not gradients[name]:
                    differences.append(f"{case}: {name} is None of one")
                continue
            scale = gradient.abs().max()
            error = (gradients[name] - gradient).abs().max() / scale
            if not error < close or not scale:
                differences.append(f"{case}: {name} {error}")
        squares = [g.double().square().sum() for g in expected.values() if g is not None]
        norm = sum(squares).sqrt()
        if not abs(sharding.gradient_norm() / norm - 1) < exact:
            differences.append(f"{case}: norm {sharding.gradient_norm()} of {norm}")
    return differences


def compare_families(world: World) -> list[str]:
    found = compare_with_one(world, "qwen2_vl", CASES)
    return found + compare_with_one(world, "qwen3_vl", DEEPSTACK)


@pytest.mark.slow
def test_gradients_are_those_of_one_process():
    assert gang(2, compare_families) == [[], []]


def sample_and_look_back(world: World, family: str, settings: dict) -> list[str]:
    """Compare rollouts, the reference's log-probabilities and what is saved with one process's."""
    alone, policy = (tiny_policy(family=family, **settings) for _ in range(2))
    for each in (alone, policy):
        if settings.get("lora"):
            torch.manual_seed(4)
            fill_adapters(each, torch.float32)
    reference, expected = Reference(policy), Reference(alone)
    sharding = spread(policy, reference, "full", world)
    examples = examples_for(alone)
    prompts = alone.encode.many(examples)

    # Processes may sample different prompts, and not equally many.
    mine = examples[: 1 + 2 * world.rank]
    sampling, differences = Sampling(max_new_tokens=8), []
    own = [local(p.detach()) for p in policy.model.parameters() if isinstance(p, DTensor)]
    before = [part.clone() for part in own]
    for _ in range(2):
        with sharding.whole_weights():
            ours = Engine(policy.model, policy.processor, policy.encode).generate(mine, 2, sampling)
            if any(part.untyped_storage().nbytes() for part in own if part.numel()):
                differences.append("rows are there twice in a rollout")
    if not all(map(torch.equal, own, before)):
        differences.append("rows after a rollout")
    theirs = Engine(alone.model, alone.processor, alone.encode).generate(mine, 2, sampling)
    if not all(map(torch.equal, ours.completions, theirs.completions)):
        differences.append("completions")
    cut = [isinstance(p, DTensor) for n, p in policy.model.named_parameters() if ".lora_" not in n]
    if not all(cut):
        differences.append("not cut again after a rollout")

    shares = [[0], [1, 2, 3], []][world.rank]
    batches = group_batches(prompts, shares)
    found = reference.logprobs(batches, 0.9)
    wanted = expected.logprobs(batches, 0.9)
    if len(found) != len(batches):
        differences.append("number of packs")
    torchs_notes = reference.sharding.root._get_fsdp_state()._comm_ctx.post_forward_order
    if torchs_notes:  # which grow with every pass until a backward pass comes
        differences.append("notes for a backward pass")
    for a, b in zip(found, wanted, strict=True):
        if not torch.allclose(a, b, rtol=1e-6, atol=1e-6):
            differences.append(f"log-probabilities {(a - b).abs().max()}")
    if not settings.get("lora"):
        bytes_here = sum(local(p).nbytes for p in policy.model.parameters())
        whole = sum(p.nbytes for p in alone.model.parameters())
        if bytes_here > 0.51 * whole:
            differences.append(f"{bytes_here} bytes here of {whole}")
    return differences


def sample_all(world: World) -> list[list[str]]:
    cases = [("qwen2_vl", {}), ("qwen3_vl", {}), ("qwen2_vl", {"lora": True}), ("qwen3", {})]
    return [sample_and_look_back(world, family, settings) for family, settings in cases]


@pytest.mark.slow
def test_rollouts_and_the_reference_are_those_of_one_process():
    assert gang(2, sample_all) == [[[]] * 4] * 2


def gather_without_room(world: World) -> str:
    sharding = sharded(tiny_policy(), world)
    with patch.object(FSDPModule, "unshard", side_effect=torch.OutOfMemoryError("no room.\nX")):
        try:
            with sharding.whole_weights():
                return "no error"
        except UserError as error:
            return str(error)


def test_no_room_for_all_weights_is_told_in_a_sentence():
    for rank, told in enumerate(gang(2, gather_without_room)):
        assert told.startswith(f"out of memory in process {rank} as all weights were brought")
        assert "(no room): take more or larger cards" in told


def test_what_stays_whole_depends_on_the_blocks_of_the_optimizer():
    parts = {"matrix": torch.nn.Linear(64, 12), "norm": torch.nn.LayerNorm(256)}
    model = torch.nn.ModuleDict(parts)
    frozen = model["norm"].bias.requires_grad_(False)

    def kept(size: int, block: int) -> set[str]:
        found = kept_whole(model, size, block)
        return {name for name, p in model.named_parameters() if any(p is each for each in found)}

    assert kept(2, 1) == set()
    assert kept(1, 256) == {"matrix.bias"}
    assert kept(3, 256) == {"matrix.bias", "norm.weight"}  # 4 rows of 64 are a block
    assert kept(2, 256) == {"matrix.weight", "matrix.bias", "norm.weight"}
    assert not frozen.requires_grad
