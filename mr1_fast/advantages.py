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
    if rewards.shape[1] < 2:
        return torch.zeros_like(rewards)

    # Comparing the standard deviation with 0 would not do: a rounded mean leaves a residue.
    equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)
    return torch.where(equal, 0.0, centred / (rewards.std(dim=1, keepdim=True) + EPSILON))
