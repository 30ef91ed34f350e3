"""What a card sends in a step, against counts by hand."""

import math
from dataclasses import replace

import pytest

from mr1_fast.config import TrainConfig
from mr1_fast.kernels.adamw.state import BLOCK
from mr1_fast.plan.planned_run import planned_run
from mr1_fast.plan.wires import Wires, step_wires

from .real_steps import small_config

CONFIG = TrainConfig(device="cpu", dtype="bfloat16", optimizer="adamw")


def wires(kind: str, processes: int, packs: int = 3, **settings) -> tuple[Wires, list]:
    """The bytes, and the trained parameters, as (name, elements, whether in a layer)."""
    config = replace(CONFIG, sharding=kind, **settings)
    run = planned_run(config, small_config(), processes)
    named = [
        (name, p.numel(), ".layers." in name or ".blocks." in name)
        for name, p in run.policy.model.named_parameters()
        if p.requires_grad
    ]
    return step_wires(run, packs), named


def test_one_process_sends_nothing():
    assert wires("full", 1)[0] == Wires()


@pytest.mark.parametrize("updates", [1, 2])
def test_none_sums_all_gradients_in_fp32(updates):
    found, named = wires("none", 4, updates_per_batch=updates)
    assert found == Wires(update=updates * 2 * 4 * sum(n for _, n, _ in named) * 3 // 4)


def test_optimizer_sends_sums_there_and_weights_back():
    found, named = wires("optimizer", 4)
    pieces = [math.ceil(math.ceil(n / BLOCK) / 4) * BLOCK for _, n, _ in named]
    assert found == Wires(update=(4 + 2) * 4 * sum(pieces) * 3 // 4)


def test_full_gathers_layers_for_each_pack_and_pass():
    found, named = wires("full", 2)  # every first dimension is even, so that nothing is filled up
    layers = 2 * sum(n for _, n, is_layer in named if is_layer)
    root = 2 * sum(n for _, n, is_layer in named if not is_layer)
    packs, summed = 3, 4 * sum(n for _, n, _ in named)
    assert found.rollout == (layers + root) // 2
    assert found.reference == (root + packs * layers) // 2
    assert found.update == packs * (root + 2 * layers + summed) // 2
    assert found.total == found.rollout + found.reference + found.update


def test_a_frozen_tower_is_not_gathered_again_for_a_backward_pass():
    (all_, named), (frozen, _) = (wires("full", 2, freeze_vision=each) for each in (False, True))
    blocks = sum(n for name, n, _ in named if ".blocks." in name)
    vision = sum(n for name, n, _ in named if ".visual." in name)
    assert all_.update - frozen.update == 3 * (2 * blocks + 4 * vision) // 2
    assert all_.rollout == frozen.rollout


def test_adapters_alone_are_summed():
    found, named = wires("none", 2, lora=True)
    assert found == Wires(update=2 * 4 * sum(n for _, n, _ in named) // 2)
    full, _ = wires("full", 2, lora=True)
    base, _ = wires("full", 2)
    # No gradients of layers, and adapters are summed once for all packs.
    assert full.rollout == base.rollout and full.update < base.update
    assert wires("full", 2, algo="sft")[0] == Wires(update=base.update)
