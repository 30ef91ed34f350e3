"""Group-relative advantages of GRPO."""

import torch

EPSILON = 1e-4


def group_advantages(rewards: torch.Tensor) -> torch.Tensor:
    """(B, G) rewards to (B, G) advantages (r − mean) / (std + 1e-4) within each group.

    The standard deviation is the sample's (n − 1), as in R1-V (TRL). A group of equal rewards, or of one, gives
    exactly 0.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if rewards.shape[1] < 2:
        return torch.zeros_like(rewards)
    equal = (rewards == rewards[:, :1]).all(
        dim=1, keepdim=True
    )  # not std == 0: a rounded mean leaves a residue
    return torch.where(equal, 0.0, centred / (rewards.std(dim=1, keepdim=True) + EPSILON))
