"""The vision tower's patch embedding, computed as a matrix product."""

import torch
import torch.nn.functional as F
from torch import nn

from .families import vision_tower


class PatchProjection(nn.Conv3d):
    """A 3D convolution whose input has exactly its kernel's size.

    It is then a matrix product, which avoids the copies that convolution libraries make of their
    data.
    """

    def forward(self, patches: torch.Tensor) -> torch.Tensor:
        """Project patches (P, C, T, H, W) to (P, D, 1, 1, 1)."""
        embedded = F.linear(patches.flatten(1), self.weight.flatten(1), self.bias)
        return embedded[:, :, None, None, None]


def use_patch_projection(model: nn.Module) -> None:
    """Make the vision tower of a model, if it has one, embed patches by a matrix product.

    Its weights stay as they are. A projection that is not such a convolution is left alone.
    """
    tower = vision_tower(model)
    if tower is None:
        return
    projection = tower.patch_embed.proj
    if type(projection) is nn.Conv3d and projection.stride == projection.kernel_size:
        projection.__class__ = PatchProjection
