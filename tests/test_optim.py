import math

import pytest
import torch

from mr1_fast.config import OptimizerConfig
from mr1_fast.distributed.sharding import gradient_norm
from mr1_fast.errors import UserError
from mr1_fast.kernels.adamw.optimizer import LowMemoryAdamW
from mr1_fast.loss_scale import LARGEST, LossScale
from mr1_fast.optim import (
    learning_rate,
    make_optimizer,
    unbiased_accumulation,
    update,
)
from mr1_fast.packing import packs
from mr1_fast.sft import sft_loss

from .data.models import mixed_examples, tiny_policy


@pytest.mark.parametrize(
    ("schedule", "middle", "last"),
    [
        ("constant", 1.0, 1.0),
        ("linear", 0.5, 1 / 90),
        ("cosine", 0.5, (1 + math.cos(math.pi * 89 / 90)) / 2),
    ],
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


@pytest.mark.parametrize("optimizer", ["adamw", "adamw8bit", "adamw_exact"])
def test_updates_raise_the_objective_the_same_for_one_pack_as_for_many(optimizer):
    histories = []
    for budget in (10**6, 100):
        policy = tiny_policy()
        config = OptimizerConfig(
            learning_rate=1e-3, lr_schedule="constant", optimizer=optimizer, max_grad_norm=0.5
        )
        stepper = make_optimizer(policy.model, config)
        batches = batches_of(policy, budget)
        histories.append(
            [update(policy, stepper, batches, likelihood, s, 4, config) for s in range(4)]
        )
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


def test_auto_keeps_bf16_weights_exact_and_leaves_fp32_to_torch():
    config = OptimizerConfig()
    assert type(make_optimizer(tiny_policy().model, config)) is torch.optim.AdamW
    exact = make_optimizer(tiny_policy(torch.bfloat16).model, config)
    assert type(exact) is LowMemoryAdamW and exact.remainder
    stochastic = make_optimizer(
        tiny_policy(torch.bfloat16).model, OptimizerConfig(optimizer="adamw_stochastic")
    )
    assert not stochastic.remainder


def name_of(policy, weight) -> str:
    return next(name for name, p in policy.model.named_parameters() if p is weight)


def test_bf16_weights_learn_at_a_small_rate():
    """At 1e-6 every update is below bf16's step; the masters move all the same."""
    policy = tiny_policy(torch.bfloat16)
    config = OptimizerConfig(learning_rate=1e-6, lr_schedule="constant")
    optimizer = make_optimizer(policy.model, config)
    before = {name: p.clone() for name, p in policy.model.named_parameters()}
    for step in range(3):
        update(policy, optimizer, batches_of(policy, 10**6), likelihood, step, 3, config)
    weight = policy.model.model.language_model.layers[0].mlp.up_proj.weight
    moved = optimizer.state[weight]["remainder"] != 0
    assert moved.float().mean() > 0.99
    assert (before[name_of(policy, weight)] != weight).float().mean() < 0.05, (
        "rounded to bf16, hardly one has"
    )


def accumulated(gradients: list[torch.Tensor], exact: bool) -> torch.Tensor:
    weight = torch.nn.Parameter(torch.zeros_like(gradients[0]))
    if not exact:
        for gradient in gradients:
            (weight * gradient).sum().backward()
        return weight.grad.double()
    with unbiased_accumulation([weight], seed=3):
        for gradient in gradients:
            (weight * gradient).sum().backward()
    return weight.grad.double()


def test_small_terms_of_bf16_gradients_add_up():
    gradients = [torch.ones(4096, dtype=torch.bfloat16)] + [
        torch.full((4096,), 1e-3, dtype=torch.bfloat16)
    ] * 500
    expected = torch.stack(gradients).double().sum(0)
    assert (accumulated(gradients, exact=False) == 1).all(), (
        "plain accumulation loses every one of them"
    )
    total = accumulated(gradients, exact=True)
    assert (total / expected - 1).mean().abs() < 3e-3  # five standard deviations; and of one, six
    assert (total / expected - 1).abs().max() < 0.25


def test_fp32_gradients_add_up_as_ever():
    gradients = [torch.randn(64) for _ in range(5)]
    assert torch.equal(accumulated(gradients, exact=True), accumulated(gradients, exact=False))


def test_a_failed_pass_leaves_no_hooks_and_no_gradients():
    weight = torch.nn.Parameter(torch.zeros(4, dtype=torch.bfloat16))
    with pytest.raises(RuntimeError), unbiased_accumulation([weight], seed=0):
        (weight * 1).sum().backward()
        raise RuntimeError
    assert not weight._post_accumulate_grad_hooks
    assert weight.grad is None, "memory for a second attempt"


def test_the_gradient_norm_is_that_of_all_gradients():
    policy = tiny_policy(torch.bfloat16)
    loss, _ = likelihood(policy, batches_of(policy, 10**6)[0])
    loss.backward()
    parameters = [p for p in policy.model.parameters() if p.grad is not None]
    expected = torch.cat([p.grad.double().flatten() for p in parameters]).norm()
    assert gradient_norm(parameters).item() == pytest.approx(expected.item(), rel=1e-5)


@pytest.mark.parametrize(
    "name, way_out",
    [
        ("adamw", "Start a new run with --optimizer adamw_exact"),
        ("adamw_exact", "Go on from there with --resume and lower --tokens-per-microbatch"),
    ],
)
def test_no_memory_for_the_optimizers_step_is_no_second_attempt(name, way_out, monkeypatch):
    policy, config = tiny_policy(), OptimizerConfig(optimizer=name)
    optimizer = make_optimizer(policy.model, config)

    def fail(*_, **__):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(optimizer, "step", fail)
    with pytest.raises(UserError, match=rf"within the optimizer's step.* {way_out}"):
        update(policy, optimizer, batches_of(policy, 10**6), likelihood, 0, 1, config)


def test_running_out_of_memory_frees_what_was_accumulated():
    policy, config = tiny_policy(torch.bfloat16), OptimizerConfig()
    optimizer, calls = make_optimizer(policy.model, config), []

    def second_fails(policy, batch):
        calls.append(batch)
        if len(calls) == 2:
            raise torch.OutOfMemoryError("no room")
        return likelihood(policy, batch)

    with pytest.raises(torch.OutOfMemoryError):
        update(policy, optimizer, batches_of(policy, 100), second_fails, 0, 1, config)
    assert len(calls) == 2 and all(p.grad is None for p in policy.model.parameters())


# --- float16 --------------------------------------------------------------------------------------


def adapted(dtype):
    """A tiny policy with adapters that are not zero."""
    policy = tiny_policy(dtype, lora=True, lora_rank=4)
    torch.manual_seed(1)
    for name, parameter in policy.model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return policy


def scaled_gradient(dtype, scale: LossScale):
    """Loss of one pack whose tokens weigh little, and the adapters' whole gradient."""
    policy = adapted(dtype)
    (batch,) = batches_of(policy, 10**6)
    batch.row_data["token_weights"] = torch.full((len(batch.targets),), 1e-6)
    loss, _ = sft_loss(policy, scale.scaled(batch))
    loss.backward()
    trained = [p for p in policy.model.parameters() if p.requires_grad]
    assert {p.dtype for p in trained} == {torch.float32}, "peft's adapters"
    scale.unscale_(p.grad for p in trained)
    return loss.item() / scale.value, torch.cat([p.grad.flatten() for p in trained])


def test_under_a_scale_float16_has_the_gradients_of_float32():
    """Errors are sums of roundings by eps/2 each, whose signs are as good as random.

    The tiny model rounds some 60 times on the way to a gradient, so √60 · eps/2 ≈ 4·eps of error
    are expected; the bound is twice that. bfloat16 has 8 times float16's eps.
    """
    loss, expected = scaled_gradient(torch.float32, LossScale())
    errors = {}
    for dtype in (torch.float16, torch.bfloat16):
        found, gradient = scaled_gradient(dtype, LossScale())
        errors[dtype] = ((gradient - expected).norm() / expected.norm()).item()
        bound = 8 * torch.finfo(dtype).eps
        assert found == pytest.approx(loss, rel=bound) and errors[dtype] < bound
    assert errors[torch.float16] < errors[torch.bfloat16] / 4

    none = LossScale()
    none.value = 1.0
    _, gradient = scaled_gradient(torch.float16, none)
    assert (gradient - expected).norm() > 0.1 * expected.norm(), "most of it is below 6e-8"


def test_what_overflows_in_float16_changes_nothing_and_halves_the_scale():
    policy, scale = adapted(torch.float16), LossScale()
    config = OptimizerConfig(learning_rate=1e-3, lr_schedule="constant")
    optimizer = make_optimizer(policy.model, config)
    batches = batches_of(policy, 10**6)
    before = {name: p.clone() for name, p in policy.model.named_parameters()}

    def loss_of(weight):
        for batch in batches:
            batch.row_data["token_weights"] = torch.full((len(batch.targets),), weight)
        return update(policy, optimizer, batches, sft_loss, 0, 1, config, scale)

    metrics = loss_of(10.0)  # 655,360 times a probability
    assert metrics["skipped"] == 1 and metrics["loss_scale"] == LARGEST
    assert scale.value == LARGEST / 2 and not optimizer.state
    assert all(torch.equal(before[name], p) for name, p in policy.model.named_parameters())

    metrics = loss_of(0.01)
    assert metrics["skipped"] == 0 and metrics["loss_scale"] == LARGEST / 2
    assert scale.state() == {"value": LARGEST / 2, "good_steps": 1}
    changed = {n for n, p in policy.model.named_parameters() if not torch.equal(before[n], p)}
    assert changed and all("lora" in name for name in changed)


def test_a_loss_scale_does_not_show_in_what_is_reported():
    """In float32, where a power of 2 rounds nothing."""
    found = []
    for scale in (None, LossScale()):
        policy = tiny_policy()
        config = OptimizerConfig(learning_rate=1e-3, lr_schedule="constant", optimizer="adamw")
        optimizer, batches = make_optimizer(policy.model, config), batches_of(policy, 100)
        for batch in batches:
            batch.row_data["token_weights"] = torch.ones(len(batch.targets))
        metrics = update(policy, optimizer, batches, sft_loss, 0, 1, config, scale)
        assert metrics.pop("loss_scale", None) == (LARGEST if scale else None)
        found.append((metrics, policy.model.state_dict()))
    (plain, weights), (scaled, others) = found
    assert plain == scaled
    assert all(torch.equal(weight, others[name]) for name, weight in weights.items())
