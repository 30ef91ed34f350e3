"""Group-relative advantages of GRPO."""

import torch

EPSILON = 1e-4
"""What is added to the standard deviation."""


def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """Turn rewards (B, G) into advantages (B, G): (r − mean) / (std + 1e-4) within each group.

    The standard deviation is the sample's, with G − 1 in its denominator, as in R1-V and TRL. A
    group of equal rewards, or of one completion, gives exactly 0.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if rewards.shape[0] == 0 or rewards.shape[1] < 2:
        return torch.zeros_like(rewards)

    # Comparing the standard deviation with 0 would not do: a rounded mean leaves a residue.
    equal = equal_groups(rewards)[:, None]
    return torch.where(equal, 0.0, centred / (rewards.std(dim=1, keepdim=True) + EPSILON))


def equal_groups(rewards: torch.Tensor) -> torch.Tensor:
    """Say for each group of rewards (B, G) whether all are equal: (B,) bool.

    Such a group has no advantages, and so no signal to learn from.
    """
    return (rewards == rewards[:, :1]).all(dim=1)
