"""Groups without a signal: left out of the loss, or replaced, the same way every time."""

import json
import math
import shutil

import pytest
import torch

from mr1_fast.advantages import group_advantages
from mr1_fast.config import TrainConfig
from mr1_fast.rollout.engine import Engine
from mr1_fast.rollout.sampling import Sampling
from mr1_fast.signal_groups import ROUNDS, groups_with_signal
from mr1_fast.stages import pack_rollout
from mr1_fast.tasks.data import load_examples
from mr1_fast.types import Rollout

from .data.models import tiny_policy
from .data.runs import run
from .test_checkpoint import metrics

PROMPTS = 4
SOME = """
from zlib import crc32

from mr1_fast.rewards import reward


@reward("some")
def some(completion, example):
    signal = crc32(example.key.encode()) % 3 == 0
    return sum(map(str.isalpha, completion)) / (1 + len(completion)) if signal else 0.5
"""
"""A reward that tells completions apart for every third prompt."""


@pytest.fixture(scope="module")
def some_args(run_args, tmp_path_factory):
    """`some_args(folder, **settings)`: a short run in which every third prompt has a signal."""
    plugin = tmp_path_factory.mktemp("plugin") / "some.py"
    plugin.write_text(SOME)
    small = dict(plugin=plugin, extra_rewards={"some": 1.0}, eval_samples=0, max_new_tokens=4)
    return lambda folder, **settings: run_args(
        folder, **{**small, "prompts_per_step": PROMPTS, **settings}
    )


@pytest.fixture(scope="module")
def refilled(some_args, tmp_path_factory):
    """Folder of a run of 6 steps that replaces groups and follows a target KL."""
    folder = tmp_path_factory.mktemp("refilled") / "run"
    settings = dict(steps=6, save_every=2, updates_per_batch=2, skip_equal_groups="refill")
    run(some_args(folder, beta_shape="target-kl", target_kl=0.001, **settings))
    return folder


def groups(folder):
    """The groups of each step, in their order: key of the prompt, rewards of its completions."""
    found = {}
    for line in (folder / "completions.jsonl").read_text().splitlines():
        record = json.loads(line)
        rewards = [sample["reward"] for sample in record["completions"]]
        found.setdefault(record["step"], []).append((record["key"], rewards))
    return found


def with_signal(sampled):
    """How many of these groups have rewards that differ."""
    return sum(len(set(rewards)) > 1 for _, rewards in sampled)


def test_a_step_whose_completions_are_all_cut_changes_nothing(some_args, tmp_path):
    """Neither β nor, by Adam's momentum, the weights; and nothing is claimed of KL or entropy."""
    settings = dict(beta_shape="target-kl", mask_truncated=True, max_new_tokens=1)
    run(some_args(tmp_path / "run", steps=2, save_every=0, **settings))
    for record in metrics(tmp_path / "run"):
        assert record["finished"] == 0 and record["skipped"] == 1 and record["beta"] == 0.07
        assert not record.keys() & {"loss", "kl", "entropy", "clip_fraction", "grad_norm"}
    assert (tmp_path / "run/report.html").exists()


def rollout_of(policy, count, generations=3):
    config = Sampling(max_new_tokens=6)
    examples = load_examples("counting", "drawn", "train", 0).all(count)
    engine = Engine(policy.model, policy.processor, policy.encode, policy.layers)
    return engine.generate(examples, generations, config, seed=1)


def test_what_remains_is_packed_as_if_nothing_else_had_been_sampled():
    sampled = rollout_of(tiny_policy(), 5)
    rewards = torch.tensor([[1, 1, 1], [0, 1, 0.5], [0, 0, 0], [1, 0, 0], [0.3, 0.3, 0.2]])
    remaining, their_rewards = groups_with_signal(sampled, rewards, limit=5)
    assert torch.equal(their_rewards, rewards[[1, 3, 4]])

    rows = [3, 4, 5, 9, 10, 11, 12, 13, 14]
    alone = Rollout(
        [sampled.examples[i] for i in (1, 3, 4)],
        [sampled.prompts[i] for i in (1, 3, 4)],
        *([each[i] for i in rows] for each in (sampled.completions, sampled.texts)),
        *([each[i] for i in rows] for each in (sampled.reasons, sampled.logprobs)),
        3,
    )
    assert remaining == alone
    packed, expected = (
        pack_rollout(each, group_advantages(rewards[[1, 3, 4]]), 150, TrainConfig())
        for each in (remaining, alone)
    )
    assert len(packed) == len(expected) > 1
    for left, right in zip(packed, expected, strict=True):
        assert torch.equal(left.input_ids, right.input_ids)
        assert left.row_data.keys() == right.row_data.keys()
        for name, values in left.row_data.items():
            assert torch.equal(values, right.row_data[name]), name
    # Normalised by what remains: the weights of 9 sequences, each 1/9 over its tokens, add up to 1.
    weights = torch.cat([batch.row_data["token_weights"] for batch in packed])
    assert weights.sum().item() == pytest.approx(1)


def test_surplus_groups_are_left_out_in_the_order_of_sampling():
    sampled = rollout_of(tiny_policy(), 4)
    rewards = torch.tensor([[0.0, 1, 0], [1, 1, 1], [1, 0, 0], [0, 0, 1]])
    remaining, _ = groups_with_signal(sampled, rewards, limit=2)
    assert remaining.examples == [sampled.examples[0], sampled.examples[2]]
    nothing, none = groups_with_signal(sampled, torch.ones(4, 3), limit=4)
    assert (nothing.examples, nothing.completions, none.shape) == ([], [], (0, 3))
    assert pack_rollout(nothing, group_advantages(none), 1000, TrainConfig()) is None


def test_dropping_nothing_changes_nothing(run_args, tmp_path):
    for how in ("keep", "drop"):
        run(run_args(tmp_path / how, skip_equal_groups=how, steps=2, eval_samples=0))
    kept, dropped = metrics(tmp_path / "keep"), metrics(tmp_path / "drop")
    assert all(step["zero_variance"] == 0 for step in kept)
    assert [{**step, "groups_sampled": 2, "groups_learnt": 2} for step in kept] == dropped
    kept, dropped = (tmp_path / how / "final/model.safetensors" for how in ("keep", "drop"))
    assert kept.read_bytes() == dropped.read_bytes()


def test_dropped_groups_are_logged_and_counted_but_not_learnt(some_args, tmp_path):
    for how in ("keep", "drop"):
        run(some_args(tmp_path / how, steps=2, skip_equal_groups=how))
    sampled = groups(tmp_path / "drop")
    first = {how: metrics(tmp_path / how)[0] for how in ("keep", "drop")}
    assert sampled[0] == groups(tmp_path / "keep")[0] and len(sampled[0]) == PROMPTS
    for name in ("reward", "zero_variance", "completion_length", "accuracy"):
        assert first["drop"][name] == first["keep"][name], name
    learnt = [step["groups_learnt"] for step in metrics(tmp_path / "drop")]
    assert learnt == [with_signal(sampled[step]) for step in (0, 1)]
    assert 0 < learnt[0] < PROMPTS == first["drop"]["groups_sampled"]
    # The loss is divided by what remains: with a KL of 0 at first, groups that are kept only
    # dilute the gradient.
    ratio = first["drop"]["grad_norm"] / first["keep"]["grad_norm"]
    assert ratio == pytest.approx(PROMPTS / learnt[0], rel=1e-4)


def test_a_step_is_filled_with_groups_of_further_prompts(refilled, some_args, tmp_path):
    run(some_args(tmp_path / "keep", steps=6, updates_per_batch=2))
    ordinary, sampled = groups(tmp_path / "keep"), groups(refilled)
    steps = metrics(refilled)
    for step, record in enumerate(steps):
        mine = sampled[step]
        # Each step begins with the prompts that it has without refills.
        assert [key for key, _ in mine[:PROMPTS]] == [key for key, _ in ordinary[step]]
        assert record["groups_sampled"] == len(mine) <= (1 + ROUNDS) * PROMPTS
        assert record["groups_learnt"] == min(PROMPTS, with_signal(mine))
        assert record["zero_variance"] == pytest.approx(1 - with_signal(mine) / len(mine))
        rewards = [reward for _, group in mine for reward in group]
        assert record["reward"] == pytest.approx(sum(rewards) / len(rewards))
        if len(mine) > PROMPTS:  # no step samples on when it is full
            assert with_signal(mine[:PROMPTS]) < PROMPTS
        if record["groups_learnt"] < PROMPTS:  # and none gives up before the last round
            assert len(mine) >= PROMPTS + ROUNDS
    assert sum(step["groups_sampled"] for step in steps) > 6 * PROMPTS
    assert max(step["groups_learnt"] for step in steps) == PROMPTS
    keys = [key for step in sampled.values() for key, _ in step]
    assert len(set(keys)) == len(keys)
    held_out = {item.key for item in load_examples("counting", "drawn", "test", 0).all(200)}
    assert not held_out & set(keys)


def test_a_resumed_run_refills_and_weighs_the_kl_as_an_uninterrupted_one(refilled, tmp_path):
    shutil.copytree(refilled, folder := tmp_path / "resumed")
    for name in ("checkpoints/step-000006", "final"):
        shutil.rmtree(folder / name)
    (folder / "report.html").unlink()
    state = json.loads((folder / "checkpoints/step-000004/state.json").read_text())
    betas = [step["beta"] for step in metrics(refilled)]
    assert len(set(betas)) == 6  # so a β that began anew would show
    assert 0.04 < state["parts"]["kl_schedule"]["beta"] != 0.07
    run(["--resume", str(folder)])
    assert metrics(folder) == metrics(refilled)
    for name in ("final/model.safetensors", "completions.jsonl"):
        assert (folder / name).read_bytes() == (refilled / name).read_bytes(), name


def test_limited_data_gives_refills_in_another_order(some_args, tmp_path):
    run(some_args(tmp_path / "run", skip_equal_groups="refill", train_samples=9, steps=4))
    allowed = {item.key for item in load_examples("counting", "drawn", "train", 0).all(9)}
    sampled = groups(tmp_path / "run")
    assert {key for step in sampled.values() for key, _ in step} <= allowed
    assert sum(map(len, sampled.values())) > 4 * PROMPTS


@pytest.mark.parametrize("how, sampled", [("drop", PROMPTS), ("refill", (1 + ROUNDS) * PROMPTS)])
def test_where_no_group_has_a_signal_steps_end_without_an_update(
    how, sampled, run_args, tmp_path, capsys
):
    run(
        run_args(
            tmp_path / "run",
            skip_equal_groups=how,
            prompts_per_step=PROMPTS,
            extra_rewards={},
            updates_per_batch=2,
        )
    )
    steps = metrics(tmp_path / "run")
    assert [step["groups_sampled"] for step in steps] == [sampled] * 3
    for step in steps:
        assert (step["groups_learnt"], step["skipped"], step["zero_variance"]) == (0, 1, 1)
        assert all(math.isfinite(value) for value in step.values())
        assert not step.keys() & {"loss", "kl", "grad_norm"}  # nothing was measured
    config = TrainConfig(steps=3, updates_per_batch=2)
    assert [step["beta"] for step in steps] == [config.kl_schedule()(s) for s in (1, 3, 5)]
    assert "nothing is learnt: in no group of the last 3 steps" in capsys.readouterr().out
    evaluation = json.loads((tmp_path / "run/evaluation.json").read_text())
    assert [shown["before"] for shown in evaluation["examples"]] == [
        shown["after"] for shown in evaluation["examples"]
    ]
    assert (tmp_path / "run/report.html").exists()
