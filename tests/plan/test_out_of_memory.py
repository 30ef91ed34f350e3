"""Out of memory in a step: the same step again with half the amount, then advice."""

import json
from pathlib import Path

import pytest
import torch

from mr1_fast import stages
from mr1_fast.config import TrainConfig
from mr1_fast.distributed import World
from mr1_fast.errors import UserError
from mr1_fast.model.spread import spread
from mr1_fast.optim import make_optimizer
from mr1_fast.packing import MicroBatches
from mr1_fast.plan.out_of_memory import KEPT, PACK_TOKENS, ROLLOUT_CACHE, MemoryLimits
from mr1_fast.rollout import engine
from mr1_fast.types import Rollout
from mr1_fast.whole_step import joined

from ..data.gang import gang
from ..data.models import mixed_examples, tiny_policy
from ..data.runs import stage_run

NO_ROOM = "CUDA out of memory. Tried to allocate 2.00 GiB.\nmore"


def room_for(amount: int, said: list) -> MemoryLimits:
    return MemoryLimits(said.append, lambda: "Change X.", {"tokens_per_microbatch": amount})


def test_half_once_and_for_good():
    said, tried = [], []

    def work(amount: int) -> int:
        tried.append(amount)
        if amount > 60:
            raise torch.OutOfMemoryError(NO_ROOM)
        return amount

    room = room_for(100, said)
    assert room.attempt("tokens_per_microbatch", work) == 50
    assert room.attempt("tokens_per_microbatch", work) == 50
    assert tried == [100, 50, 50]
    assert said == [
        "out of memory with tokens_per_microbatch = 100: once more, and from here on, with 50"
    ]


def test_relief_comes_before_half_the_amount():
    said, tried, changes = [], [], ["all layers recomputed"]

    def work(amount: int) -> int:
        tried.append((amount, bool(changes)))
        if amount > 60:
            raise torch.OutOfMemoryError(NO_ROOM)
        return amount

    def relief() -> str:
        return changes.pop() if changes else ""

    room = room_for(100, said)
    assert room.attempt("tokens_per_microbatch", work, relief=relief) == 50
    assert room.attempt("tokens_per_microbatch", work, relief=relief) == 50
    assert tried == [(100, True), (100, False), (50, False), (50, False)]
    before = "out of memory with tokens_per_microbatch = 100: once more, and from here on, with "
    assert said == [before + "all layers recomputed", before + "50"]


@pytest.mark.parametrize("recompute, changes", [("auto", True), ("none", False)])
def test_layers_are_recomputed_where_memory_runs_out_and_the_settings_leave_it_open(
    recompute, changes
):
    policy = tiny_policy(recompute=recompute)
    policy.layers.recompute_text, policy.layers.recompute_vision = 1, 0
    run = stage_run(policy, TrainConfig(recompute=recompute))
    assert run.recompute_all() == ("all layers recomputed" if changes else "")
    assert policy.layers.recompute_text == (3 if changes else 1)
    assert policy.layers.recompute_vision == (2 if changes else 0)
    assert run.recompute_all() == ""


@pytest.mark.parametrize("amount", [100, 1])
def test_a_second_failure_ends_with_advice(amount):
    def work(amount: int):
        raise torch.OutOfMemoryError(NO_ROOM)

    with pytest.raises(
        UserError,
        match=r"Tried to allocate 2.00 GiB\). The last checkpoint is intact.*--resume. Change X.",
    ):
        room_for(amount, []).attempt("tokens_per_microbatch", work)


def test_half_of_what_is_of_use():
    tried = []

    def work(amount: int) -> None:
        tried.append(amount)
        if amount > 30:
            raise torch.OutOfMemoryError(NO_ROOM)

    room_for(1000, []).attempt("tokens_per_microbatch", work, most=60)
    assert tried == [60, 30]


def test_a_rollout_that_runs_out_of_memory_draws_the_same_with_half_the_cache(monkeypatch):
    policy = tiny_policy(torch.float64)
    prompts = policy.encode.many(mixed_examples())
    config, layouts = TrainConfig(max_new_tokens=6, num_generations=3), []

    def cramped(text_model, layout):
        layouts.append(layout)
        if len(layouts) == 2:
            raise torch.OutOfMemoryError(NO_ROOM)
        return pool(text_model, layout)

    pool = engine.Pool
    monkeypatch.setattr(engine, "Pool", cramped)
    run = stage_run(policy, config)
    needed = engine.fitting(prompts, 3, config).tokens
    for _ in range(2):
        drawn = [stages.sample(run, mixed_examples(), 0) for _ in range(2)]
    assert [layout.tokens <= needed // 2 for layout in layouts] == [False, False, True, True, True]
    assert all(
        torch.equal(a, b) for a, b in zip(drawn[0].completions, drawn[1].completions, strict=True)
    )


def test_a_budget_that_cannot_be_halved_says_so():
    prompts = [tiny_policy().encode(mixed_examples()[0])]
    length = len(prompts[0].input_ids)
    batches = MicroBatches(prompts, [torch.tensor([5, 6])], length + 1)

    def work(amount: int):
        batches.repack(amount)
        raise torch.OutOfMemoryError(NO_ROOM)

    with pytest.raises(
        UserError, match="half of that will not do: a prompt with its completion has"
    ):
        room_for(length + 1, []).attempt("tokens_per_microbatch", work)


def drawn_rollout(policy) -> Rollout:
    generator = torch.Generator().manual_seed(3)
    examples = mixed_examples()
    completions = [
        torch.randint(0, 300, (n,), generator=generator) for n in (4, 2, 9, 1, 5, 5, 3, 7)
    ]
    prompts = [policy.encode(example) for example in examples]
    logprobs = [
        torch.full((len(ids),), -5.7) for ids in completions
    ]  # about that of 300 tokens' mean
    return Rollout(
        examples, prompts, completions, [""] * 8, ["eos"] * 8, logprobs, num_generations=2
    )


def test_rows_keep_their_data_when_packed_anew():
    policy = tiny_policy()
    rollout = drawn_rollout(policy)
    advantages = torch.arange(8.0).reshape(4, 2)
    batches = stages.pack_rollout(rollout, advantages, 10**6, TrainConfig())
    expected = stages.pack_rollout(rollout, advantages, 150, TrainConfig())
    batches.repack(150)
    assert len(batches) == len(expected) > 1
    for batch, other in zip(batches, expected, strict=True):
        assert batch.sequence_ids == other.sequence_ids
        assert batch.row_data.keys() == other.row_data.keys()
        assert all(
            torch.equal(batch.row_data[name], other.row_data[name]) for name in other.row_data
        )


def test_a_step_that_recomputes_after_it_ran_out_of_memory_changes_no_bit():
    weights, said = [], []
    for runs_out in (False, True):
        policy = tiny_policy()
        rollout, config = drawn_rollout(policy), TrainConfig(learning_rate=1e-3)
        run = stage_run(policy, config, 200, said, optimizer=make_optimizer(policy.model, config))
        batches = stages.pack_rollout(rollout, torch.arange(8.0).reshape(4, 2), 200, config)
        calls = []

        def batch_loss(policy, batch, config=config, calls=calls, runs_out=runs_out):
            calls.append(policy.layers.recompute_text)
            if runs_out and len(calls) == 2:
                raise torch.OutOfMemoryError(NO_ROOM)
            return stages.grpo_batch_loss(policy, batch, 0.0, config)

        stages.learn(run, batches, batch_loss, 0)
        assert calls == ([0, 0, *[3] * len(batches)] if runs_out else [0] * len(batches))
        weights.append([p.detach().clone() for p in policy.model.parameters()])
    assert len(said) == 1 and said[0].endswith("with all layers recomputed")
    assert all(torch.equal(a, b) for a, b in zip(*weights, strict=True))


def test_a_step_that_runs_out_of_memory_ends_where_one_in_small_packs_does():
    """Memory "runs out" in the update's second pack, when gradients of the first exist already."""
    weights = []
    for budget in (200, 100):
        policy = tiny_policy()
        rollout = drawn_rollout(policy)
        config = TrainConfig(learning_rate=1e-3, updates_per_batch=2, recompute="none")
        optimizer, said, calls = make_optimizer(policy.model, config), [], []
        batches = stages.pack_rollout(
            rollout, torch.randn(4, 2, generator=torch.Generator().manual_seed(1)), budget, config
        )
        run = stage_run(policy, config, budget, said, optimizer=optimizer)
        stages.add_logprobs(run, batches)

        def batch_loss(policy, batch, config=config, calls=calls, budget=budget):
            calls.append(len(batch.input_ids))
            if budget == 200 and len(calls) == 2:
                raise torch.OutOfMemoryError(NO_ROOM)
            return stages.grpo_batch_loss(policy, batch, 0.0, config)

        for step in range(2):
            stages.learn(run, batches, batch_loss, step)
        weights.append(torch.cat([p.detach().flatten() for p in policy.model.parameters()]))
        assert len(batches) > 2 and max(len(batch.input_ids) for batch in batches) <= 100
        assert len(said) == (budget == 200)
    difference = (
        weights[0] - weights[1]
    ).abs()  # Adam's first steps are signs: rounding may turn a gradient near 0
    assert difference.max() < 0.1 * 1e-3 and difference.mean() < 1e-4 * 1e-3


# --- several processes ----------------------------------------------------------------------------


def test_the_process_that_is_out_of_memory_for_good_names_itself():
    def work(amount: int):
        raise torch.OutOfMemoryError(NO_ROOM)

    room = MemoryLimits([].append, lambda: "Change X.", {"x": 8}, World(rank=1, size=2))
    with pytest.raises(UserError, match=r"^out of memory in process 1 with x = 4"):
        room.attempt("x", work)


def run_out_and_restart(world, path: Path) -> tuple[list[str], list[str]]:
    """Start twice, in both processes, with a file for the restart at `path`."""
    first = step_in_parts(world, path)
    world.barrier()
    return first, step_in_parts(world, path)


def step_in_parts(world, path: Path) -> list[str]:
    """Take a step with weights in parts, which is out of memory with more than 150 tokens.

    Returns what it said, and what ended it.
    """
    policy, config = tiny_policy(), TrainConfig(learning_rate=1e-3)
    policy.layers.recompute_text = 0  # a relief that another process might not have
    sharding, said = spread(policy, None, "full", world), []
    optimizer = make_optimizer(policy.model, config, 0, sharding.parts)
    run = stage_run(policy, config, optimizer=optimizer, world=world, sharding=sharding)
    amounts = {PACK_TOKENS: 200, ROLLOUT_CACHE: 200}
    limits = MemoryLimits(said.append, lambda: "Change X.", amounts, world, path)
    run.limits = limits

    def work(amount: int) -> int:
        if amount > 150:
            raise torch.OutOfMemoryError(NO_ROOM)
        return amount

    # A rollout exchanges nothing, so that each process tries again by itself.
    assert limits.attempt(ROLLOUT_CACHE, work) == 100
    rollout = drawn_rollout(policy)
    batches = stages.pack_rollout(rollout, torch.arange(8.0).reshape(4, 2), 200, config)

    def batch_loss(policy, batch):
        work(limits.amounts[PACK_TOKENS])
        return stages.grpo_batch_loss(policy, batch, 0.0, config)

    try:
        stages.learn(run, batches, batch_loss, 0)
    except UserError as error:
        said.append(str(error))
    return said


def test_where_weights_are_in_parts_half_the_amount_is_kept_for_a_restart(tmp_path):
    path = tmp_path / "run" / KEPT
    line = f"tokens_per_microbatch = 100: this run was out of memory with more ({path})"
    for rank, (ended, restarted) in enumerate(gang(2, run_out_and_restart, path)):
        assert ended == [
            f"out of memory in process {rank} with tokens_per_microbatch = 200 (CUDA out of "
            "memory. Tried to allocate 2.00 GiB), and --sharding full cannot try again in one "
            "process alone. The last checkpoint is intact: go on from there with --resume, which "
            "begins with tokens_per_microbatch = 100. Change X."
        ]
        assert restarted == [line]
    assert json.loads(path.read_text()) == {PACK_TOKENS: 100}

    def limits() -> MemoryLimits:
        return MemoryLimits([].append, lambda: "", {PACK_TOKENS: 100}, World(1, 2), path)

    for damaged in ('{"tokens_per_microbatch": 200}', "["):
        path.write_text(damaged)
        assert limits().amounts == {PACK_TOKENS: 100}


def run_out_in_process_1(world, budget: int):
    """Sample and take two steps; process 1 runs out of memory in each, in the second pack."""
    policy, config = tiny_policy(), TrainConfig(learning_rate=1e-3, recompute="none")
    config.max_new_tokens, config.num_generations = 6, 2
    said, calls, fails = [], [], world.rank == 1
    optimizer = make_optimizer(policy.model, config)
    run = stage_run(policy, config, budget, said, optimizer=optimizer, world=world)

    pool = engine.Pool

    def cramped(*arguments):
        calls.append(arguments)
        if fails and len(calls) == 1:
            raise torch.OutOfMemoryError(NO_ROOM)
        return pool(*arguments)

    engine.Pool = cramped
    stages.sample(run, world.share(mixed_examples()), 0)
    calls.clear()

    rollout = joined(drawn_rollout(policy), drawn_rollout(policy))
    mine = world.share(range(8))
    rollout.prompts = [p if i in mine else None for i, p in enumerate(rollout.prompts)]
    advantages = torch.randn(8, 2, generator=torch.Generator().manual_seed(1))
    batches = stages.pack_rollout(rollout, advantages, budget, config)

    def batch_loss(policy, batch):
        calls.append(len(batch.input_ids))
        if fails and len(calls) == 2:
            raise torch.OutOfMemoryError(NO_ROOM)
        return stages.grpo_batch_loss(policy, batch, 0.0, config)

    stages.learn(run, batches, batch_loss, 0)
    before = list(said)
    run.limits.agree()
    calls.clear()
    fails = False
    stages.learn(run, batches, batch_loss, 1)
    weights = torch.cat([p.detach().flatten() for p in policy.model.parameters()])
    return weights, run.limits.amounts, before, said, max(calls)


def test_one_process_out_of_memory_ends_in_smaller_packs_for_all():
    (first, *told), (second, *also_told) = gang(2, run_out_in_process_1, 200)
    assert torch.equal(first, second)
    expected, *_ = run_out_in_process_1(World(), 100)
    difference = (first - expected).abs()  # Adam's first steps are signs, as above
    assert difference.max() < 0.1 * 1e-3 and difference.mean() < 1e-4 * 1e-3
    for amounts, before, said, largest in (told, also_told):
        assert amounts[PACK_TOKENS] == 100 and amounts[ROLLOUT_CACHE] < 200 and largest <= 100
        assert not before and len(said) == 2
        rollout, packs = sorted(said, key=lambda line: "rollout" not in line)
        assert rollout.startswith("process 1: out of memory with tokens in the rollout's KV cache")
        assert "1: out of memory with tokens_per_microbatch = 200: once more, and from" in packs
