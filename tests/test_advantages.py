import pytest
import torch

from mr1_fast.advantages import equal_groups, group_advantages


def test_centres_and_scales_within_each_group():
    rewards = torch.tensor([[2.0, 0.0, 1.0, 1.0], [5.0, 5.0, 5.0, 1.0]])
    advantages = group_advantages(rewards)
    for row, group in zip(advantages, rewards, strict=True):
        mean = sum(group.tolist()) / 4
        std = (sum((r - mean) ** 2 for r in group.tolist()) / 3) ** 0.5  # the sample's, n − 1
        torch.testing.assert_close(row, (group - mean) / (std + 1e-4))


def test_other_kinds_scale_by_the_whole_step_or_by_nothing():
    rewards = torch.tensor([[2.0, 0.0, 1.0, 1.0], [5.0, 5.0, 5.0, 1.0]])
    centred = torch.tensor([[1.0, -1.0, 0.0, 0.0], [1.0, 1.0, 1.0, -3.0]])
    assert torch.equal(group_advantages(rewards, "group-mean"), centred)
    std = (sum((r - 2.5) ** 2 for r in rewards.flatten().tolist()) / 7) ** 0.5
    torch.testing.assert_close(group_advantages(rewards, "batch-std"), centred / (std + 1e-4))


@pytest.mark.parametrize("kind", ["group-std", "batch-std"])
def test_the_standard_deviation_has_trls_epsilon(kind):
    # Rewards this near to each other show what is added: the scale is 1e-4 and 1e-4.
    rewards = torch.tensor([[0.0, 1e-4, 2e-4]], dtype=torch.float64)
    expected = torch.tensor([[-0.5, 0.0, 0.5]], dtype=torch.float64)
    torch.testing.assert_close(group_advantages(rewards, kind), expected, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("kind", ["group-std", "group-mean", "batch-std"])
def test_equal_rewards_give_exactly_zero(kind):
    # The mean of three times 0.1 may round; dividing by 1e-4 would magnify the residue.
    assert (group_advantages(torch.full((1, 3), 0.1), kind) == 0).all()
    assert (group_advantages(torch.full((2, 7), 1 / 3), kind) == 0).all()
    assert (group_advantages(torch.tensor([[0.7]]), kind) == 0).all()


def test_groups_without_a_signal_are_those_without_advantages():
    rewards = torch.tensor([[0.1, 0.1, 0.1], [0, 1, 0], [1 / 3, 1 / 3, 0.333]])
    assert equal_groups(rewards).tolist() == [True, False, False]
    assert (group_advantages(rewards) == 0).all(dim=1).tolist() == [True, False, False]
    assert group_advantages(torch.zeros(0, 3)).shape == (0, 3)
