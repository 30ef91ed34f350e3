"""Stages on a few rows: rewards with the overlong penalty, and steps without anything to learn.

That losses and gradients are right, test_objectives.py shows.
"""

import pytest
import torch

from mr1_fast.advantages import group_advantages
from mr1_fast.config import TrainConfig
from mr1_fast.kernels.grpo.reference import policy_loss_ref
from mr1_fast.loss import LOSS_TYPES
from mr1_fast.loss_scale import LARGEST, LossScale
from mr1_fast.stages import grpo_batch_loss, pack_rollout, score_rollout
from mr1_fast.types import Prompt, Rollout

from .data.hostile import example
from .data.models import given_policy
from .data.runs import stage_run

D, V = 4, 20


def rollout_of(lengths: list[int], reasons: list[str], groups: int = 2) -> Rollout:
    prompts = [Prompt(torch.tensor([5]), torch.zeros(3, 1).long(), 1) for _ in range(groups)]
    completions = [torch.arange(5, 5 + n) for n in lengths]
    sampled = [torch.zeros(n) for n in lengths]
    texts = ["<think>a</think><answer>1</answer>"] * len(lengths)
    size = len(lengths) // groups
    examples = [example("1")] * groups
    return Rollout(examples, prompts, completions, texts, reasons, sampled, size)


def step_of(
    rollout: Rollout, config: TrainConfig, scale: LossScale | None = None
) -> tuple[float, torch.Tensor, dict]:
    """Loss, gradient of the hidden states, and the last pack's metrics."""
    lengths = list(map(len, rollout.completions))
    groups = len(rollout.prompts)
    rewards = torch.arange(len(lengths)).float().view(groups, -1)
    batches = pack_rollout(rollout, group_advantages(rewards, config.advantage), 8, config)
    batches.add_row_data({"ref_logp": torch.full((sum(lengths),), -2.0)})
    hidden = torch.randn(sum(lengths), D, requires_grad=True)
    policy = given_policy(hidden, torch.nn.Linear(D, V, bias=False), lengths)
    loss = torch.zeros(())
    for batch in batches:
        batch = scale.scaled(batch) if scale else batch
        part, metrics = grpo_batch_loss(policy, batch, 0.1, config)
        loss = loss + part
    loss.backward()
    return loss.item(), hidden.grad, metrics


NOTHING = {
    "all cut": ([3, 2, 3, 1], ["length"] * 4, 2),
    "all empty": ([0, 0, 0, 0], ["eos"] * 4, 2),
    "empty but one, which is cut": ([0, 0, 3, 0], ["eos", "eos", "length", "eos"], 2),
    "one row, cut": ([1], ["length"], 1),
}


@pytest.mark.parametrize("case", NOTHING)
@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_step_without_a_token_that_counts_has_no_packs(loss_type, ratio, case):
    settings = dict(loss_type=loss_type, ratio=ratio, mask_truncated=True, max_new_tokens=3)
    rollout = rollout_of(*NOTHING[case])
    advantages = torch.zeros(len(rollout.prompts), rollout.num_generations)
    for entropy in (0.0, 0.1):
        config = TrainConfig(**settings, entropy_coefficient=entropy)
        assert pack_rollout(rollout, advantages, 8, config) is None


@pytest.mark.parametrize("ratio", ["token", "sequence"])
@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_a_pack_without_a_token_that_counts_adds_nothing(loss_type, ratio):
    settings = dict(loss_type=loss_type, ratio=ratio, mask_truncated=True, max_new_tokens=3)
    rollout = rollout_of([3, 3, 3, 3], ["eos", "eos", "length", "length"])
    for entropy in (0.0, 0.1):
        config = TrainConfig(**settings, entropy_coefficient=entropy)
        loss, gradient, metrics = step_of(rollout, config)
        assert loss != 0 and (gradient != 0).any(dim=1).tolist() == [True] * 6 + [False] * 6
        assert not len(metrics["entropy"].values)  # of the last pack


@pytest.mark.parametrize("loss_type", LOSS_TYPES)
def test_an_empty_completion_and_a_cut_one_spoil_nothing(loss_type):
    config = TrainConfig(loss_type=loss_type, mask_truncated=True, max_new_tokens=3)
    rollout = rollout_of([0, 2, 3, 1], ["eos", "eos", "length", "eos"])
    loss, gradient, _ = step_of(rollout, config)
    assert loss != 0 and gradient.isfinite().all()
    assert (gradient != 0).any(dim=1).tolist() == [True, True, False, False, False, True]


@pytest.mark.parametrize("ratio", ["token", "sequence"])
def test_a_loss_scale_multiplies_all_of_the_loss(ratio):
    config = TrainConfig(ratio=ratio, entropy_coefficient=0.1, max_new_tokens=3)
    steps = []
    for scale in (None, LossScale()):
        torch.manual_seed(0)
        rollout = rollout_of([0, 2, 3, 1], ["eos", "eos", "length", "eos"])
        steps.append(step_of(rollout, config, scale))
    (loss, gradient, metrics), (scaled, larger, others) = steps
    assert loss != 0 and scaled == loss * LARGEST and torch.equal(larger, gradient * LARGEST)
    assert torch.equal(metrics["entropy"].values, others["entropy"].values)


def test_the_pulls_are_the_sizes_of_what_multiplies_the_gradient_of_each_log_probability():
    torch.manual_seed(0)
    beta, config = 0.3, TrainConfig()
    hidden = 2 * torch.randn(9, D)
    policy = given_policy(hidden, torch.nn.Linear(D, V, bias=False), [4, 5])
    [batch] = pack_rollout(rollout_of([4, 5], ["eos"] * 2, groups=1), torch.ones(1, 2), 99, config)
    ref_logp = torch.full((9,), -2.0)
    ref_logp[3] = -90.0  # so far away that the loss holds it constant
    advantages = torch.linspace(-2, 1, 9)
    batch.row_data |= {"ref_logp": ref_logp, "advantages": advantages}

    _, metrics = grpo_batch_loss(policy, batch, beta, config)

    logits = policy.model.lm_head(hidden).double()
    logp = logits.log_softmax(-1).gather(-1, batch.targets[:, None])[:, 0]
    logp = logp.detach().requires_grad_()
    options = dict(beta=beta, ref_logp=ref_logp.double())
    by_kl = policy_loss_ref(logp, torch.zeros(9).double(), torch.ones(9).double(), **options)[0]
    (expected,) = torch.autograd.grad(by_kl.sum(), logp)
    assert expected[3] == 0 and expected.abs().max() > 0.1
    pull = metrics["kl_pull"].values.double()
    torch.testing.assert_close(pull, expected.abs(), rtol=1e-4, atol=0)
    assert torch.equal(metrics["reward_pull"].values, advantages.abs())

    # Of a float16 model they are not scaled, and a row that is masked has no part in them.
    batch.row_data["token_weights"][5] = 0
    _, masked = grpo_batch_loss(policy, LossScale().scaled(batch), beta, config)
    for name in ("kl_pull", "reward_pull"):
        values = metrics[name].values
        assert torch.equal(masked[name].values, torch.cat([values[:5], values[6:]]))


def test_a_step_without_groups_has_no_packs():
    nothing = Rollout([], [], [], [], [], [], 4)
    assert pack_rollout(nothing, torch.zeros(0, 4), 8, TrainConfig(loss_type="bnpo")) is None


def test_weights_of_cut_completions_and_of_their_normalisers():
    rollout = rollout_of([1, 2, 3, 2], ["eos", "eos", "length", "eos"])
    expected = {  # rows of completions 0, 1 and 3; those of completion 2 are cut
        "grpo": (1 / 4, 1 / 8, 1 / 8),
        "luspo": (1 / 4, 1 / 4, 1 / 4),
        "dr_grpo": (1 / 40, 1 / 40, 1 / 40),
        "dapo": (1 / 5, 1 / 5, 1 / 5),
        "bnpo": (1 / 6, 1 / 6, 1 / 4),  # each group has one half
    }
    for loss_type, (first, second, last) in expected.items():
        config = TrainConfig(loss_type=loss_type, mask_truncated=True, max_new_tokens=10)
        batches = pack_rollout(rollout, torch.zeros(2, 2), 4, config)
        weights = torch.cat([batch.row_data["token_weights"] for batch in batches])
        right = torch.tensor([first, second, second, 0, 0, 0, last, last])
        torch.testing.assert_close(weights, right, msg=loss_type)


def test_the_overlong_penalty_is_a_part_of_the_reward():
    rollout = rollout_of([1, 8, 9, 10], ["eos", "eos", "eos", "length"])
    plain = TrainConfig(max_new_tokens=10)
    scores = score_rollout(stage_run(None, plain), rollout, 0)
    assert scores.total.tolist() == [[2.0, 2.0], [2.0, 2.0]] and "overlong" not in scores.parts

    config = TrainConfig(max_new_tokens=10, overlong_penalty=0.2)
    scores = score_rollout(stage_run(None, config), rollout, 0)
    assert scores.parts["overlong"] == [0.0, 0.0, -0.5, -1.0]
    assert scores.total.tolist() == [[2.0, 2.0], [1.5, 1.0]]
    assert scores.means() == {"accuracy": 1.0, "format": 1.0, "overlong": -0.375}
