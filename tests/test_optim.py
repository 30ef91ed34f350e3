import math

import pytest
import torch

from mr1_fast.config import OptimizerConfig
from mr1_fast.optim import learning_rate, make_optimizer, update
from mr1_fast.packing import packs
from mr1_fast.sft import sft_loss

from .models import mixed_examples, tiny_policy


@pytest.mark.parametrize(
    ("schedule", "middle", "last"),
    [("constant", 1.0, 1.0), ("linear", 0.5, 1 / 90), ("cosine", 0.5, (1 + math.cos(math.pi * 89 / 90)) / 2)],
)
def test_learning_rate_warms_up_then_follows_its_schedule(schedule, middle, last):
    config = OptimizerConfig(learning_rate=2.0, lr_schedule=schedule, warmup_fraction=0.1)
    rates = [learning_rate(step, 100, config) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (step + 1) for step in range(10)])
    assert rates[10] == pytest.approx(2.0)
    assert rates[55] == pytest.approx(2 * middle)
    assert rates[99] == pytest.approx(2 * last)


def batches_of(policy, budget: int):
    prompts = [policy.encode(example) for example in mixed_examples()]
    return list(packs(prompts, [torch.tensor([5, 6, 7]), torch.tensor([8])] * 4, budget))


def likelihood(policy, batch):
    batch.row_data["token_weights"] = torch.ones(len(batch.targets))
    return sft_loss(policy, batch)


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit"])
def test_updates_raise_the_objective_the_same_for_one_pack_as_for_many(optimizer):
    histories = []
    for budget in (10**6, 100):
        policy = tiny_policy()
        config = OptimizerConfig(learning_rate=1e-3, lr_schedule="constant", optimizer=optimizer, max_grad_norm=0.5)
        stepper = make_optimizer(policy.model, config)
        batches = batches_of(policy, budget)
        histories.append([update(policy, stepper, batches, likelihood, s, 4, config) for s in range(4)])
    for one, many in zip(*histories, strict=True):
        assert many == pytest.approx(one, rel=2e-3)
    losses = [metrics["loss"] for metrics in histories[0]]
    assert losses == sorted(losses, reverse=True)
    assert histories[0][0]["grad_norm"] > 0.5


def test_a_gradient_that_is_not_finite_changes_nothing_and_is_reported():
    policy = tiny_policy()
    config = OptimizerConfig(learning_rate=1e-3, lr_schedule="constant")
    optimizer = make_optimizer(policy.model, config)
    batches = batches_of(policy, 10**6)
    before = {name: p.clone() for name, p in policy.model.named_parameters()}

    def infinite(policy, batch):
        loss, per_row = likelihood(policy, batch)
        return loss * math.inf, per_row

    metrics = update(policy, optimizer, batches, infinite, 0, 2, config)
    assert metrics["skipped"] == 1.0
    assert all(torch.equal(before[name], p) for name, p in policy.model.named_parameters())
    assert update(policy, optimizer, batches, likelihood, 1, 2, config)["skipped"] == 0.0
