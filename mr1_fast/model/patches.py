"""The vision tower's patch embedding as the matrix product that it is."""

import torch
import torch.nn.functional as F
from torch import nn


class PatchProjection(nn.Conv3d):
    """A convolution whose input is one kernel's size: a product, where convolution libraries lay data out anew."""

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """(P, C, T, H, W) -> (P, D, 1, 1, 1)."""
        return F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)[
            :, :, None, None, None
        ]


def use_patch_projection(model: nn.Module) -> None:
    """Make a `…ForConditionalGeneration` of the Qwen2-VL family embed patches by a matrix product; weights stay."""
    projection = model.model.visual.patch_embed.proj
    if type(projection) is nn.Conv3d and projection.stride == projection.kernel_size:
        projection.__class__ = PatchProjection
