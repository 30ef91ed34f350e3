"""Group-relative advantages of GRPO."""

import torch

EPSILON = 1e-4
"""What is added to the standard deviation."""


def group_advantages(rewards: torch.Tensor, kind: str = "group-std") -> torch.Tensor:
    """Turn rewards (B, G) into advantages (B, G): r minus the mean of its group, over a scale.

    The scale is what `kind` names, and what TRL's `scale_rewards` does:

    - group-std: the group's standard deviation + 1e-4 (DeepSeekMath, arXiv 2402.03300); "group"
    - batch-std: that of all B·G rewards + 1e-4 (arXiv 2508.08221); "batch"
    - group-mean: 1 (Dr. GRPO, arXiv 2503.20783); "none"

    Standard deviations are the sample's, with n − 1 in the denominator, as in R1-V and TRL. A group
    of equal rewards, or of one completion, gives exactly 0.
    """
    centred = rewards - rewards.mean(dim=1, keepdim=True)
    if rewards.shape[0] == 0 or rewards.shape[1] < 2:
        return torch.zeros_like(rewards)

    if kind == "group-std":
        centred = centred / (rewards.std(dim=1, keepdim=True) + EPSILON)
    elif kind == "batch-std":
        centred = centred / (rewards.std() + EPSILON)

    # Comparing the standard deviation with 0 would not do: a rounded mean leaves a residue.
    return torch.where(equal_groups(rewards)[:, None], 0.0, centred)


def equal_groups(rewards: torch.Tensor) -> torch.Tensor:
    """Say for each group of rewards (B, G) whether all are equal: (B,) bool.

    Such a group has no advantages, and so no signal to learn from.
    """
    return (rewards == rewards[:, :1]).all(dim=1)
