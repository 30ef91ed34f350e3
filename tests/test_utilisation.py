"""TFLOP/s and MFU of a step's stages."""

import pytest
import torch

from mr1_fast.config import TrainConfig
from mr1_fast.model.flop_count import Trained, count_flop
from mr1_fast.model.reference import Reference
from mr1_fast.packing import MicroBatches
from mr1_fast.utilisation import device_peak, speeds, stage_flop, utilisation

from .data.models import mixed_examples, tiny_policy
from .data.runs import stage_run


def make_batches(policy, tokens_per_pack=10**6):
    prompts = policy.encode.many(mixed_examples())
    completions = [torch.zeros(length, dtype=torch.int64) for length in (5, 2, 7, 1, 3, 3, 4, 6)]
    return MicroBatches(prompts, completions, tokens_per_pack)


def passes(policy, batches):
    """FLOP of the policy's forward and backward pass over all packs."""
    trained = Trained.of(policy.model)
    counts = [count_flop(policy.model.config, batch, trained) for batch in batches]
    return tuple(map(sum, zip(*counts, strict=True)))


def test_a_step_is_a_pass_of_the_reference_and_updates_of_the_policy():
    policy = tiny_policy()
    batches = make_batches(policy)
    forward, backward = passes(policy, batches)
    assert backward > forward
    run = stage_run(policy, TrainConfig(updates_per_batch=3), reference=Reference(policy))
    assert stage_flop(run, batches) == {"reference": forward, "update": 3 * (forward + backward)}

    # A pass of the policy's own gives the importance weights, also without a reference.
    run = stage_run(policy, TrainConfig(importance_cap=2.0))
    assert stage_flop(run, batches) == {"reference": forward, "update": forward + backward}
    run = stage_run(policy, TrainConfig(algo="sft", importance_cap=2.0))
    assert stage_flop(run, batches)["reference"] == 0


def test_the_reference_has_no_adapters_and_the_policys_own_pass_has_them():
    pytest.importorskip("peft")
    policy = tiny_policy(lora=True, lora_rank=8)
    batches = make_batches(policy)
    forward, _ = passes(policy, batches)
    run = stage_run(policy, TrainConfig(lora=True), reference=Reference(policy))
    bare = stage_flop(run, batches)["reference"]
    assert 0.5 * forward < bare < forward
    run.config.importance_cap = 2.0
    assert stage_flop(run, batches)["reference"] == bare + forward


def test_prompts_that_are_computed_once_more_count_once_more():
    policy = tiny_policy()
    run = stage_run(policy, TrainConfig())
    whole, split = make_batches(policy), make_batches(policy, 82)
    assert len(split) > len(whole)
    assert stage_flop(run, split)["update"] > stage_flop(run, whole)["update"]


def test_flop_are_divided_by_seconds_and_by_the_peak():
    laps = {"seconds_rollout": 9.0, "seconds_reference": 0.5, "seconds_update": 2.0}
    flop = {"reference": 3 * 10**13, "update": 2 * 10**14}
    known = speeds(flop, laps, peak=200e12)
    assert known == pytest.approx(
        {"tflops_reference": 60, "mfu_reference": 0.3, "tflops_update": 100, "mfu_update": 0.5}
    )
    assert speeds(flop, laps, peak=None) == {
        name: value for name, value in known.items() if name.startswith("tflops")
    }
    assert speeds({"reference": 0, "update": 10**12}, {"seconds_update": 1.0}, None) == {
        "tflops_update": 1.0
    }


def test_a_cpu_has_a_speed_and_no_utilisation():
    policy = tiny_policy()
    assert device_peak(policy.device, torch.float32) is None
    run = stage_run(policy, TrainConfig())
    assert utilisation(run, make_batches(policy), {"seconds_update": 1.0}).keys() == {
        "tflops_update"
    }
