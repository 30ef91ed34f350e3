import pytest
import torch
from torch import nn

from mr1_fast.model.patches import PatchProjection, use_patch_projection

from ..data.models import VISION_FAMILIES, tiny_policy


@pytest.mark.parametrize("bias", [False, True])
def test_the_product_equals_the_convolution_with_all_gradients(bias):
    torch.manual_seed(0)
    plain = nn.Conv3d(3, 8, (2, 4, 4), stride=(2, 4, 4), bias=bias, dtype=torch.float64)
    product = nn.Conv3d(3, 8, (2, 4, 4), stride=(2, 4, 4), bias=bias, dtype=torch.float64)
    product.load_state_dict(plain.state_dict())
    product.__class__ = PatchProjection
    x = torch.randn(5, 3, 2, 4, 4, dtype=torch.float64, requires_grad=True)
    results = []
    for module in (plain, product):
        out = module(x)
        results.append([out, *torch.autograd.grad((out**2).sum(), [x, *module.parameters()])])
    for ours, right in zip(*reversed(results), strict=True):
        torch.testing.assert_close(ours, right)


@pytest.mark.parametrize("family", VISION_FAMILIES)
def test_policies_use_it(family):
    policy = tiny_policy(family=family)
    assert isinstance(policy.model.model.visual.patch_embed.proj, PatchProjection)


def test_other_convolutions_stay():
    policy = tiny_policy()
    embedding = policy.model.model.visual.patch_embed
    embedding.proj = nn.Conv3d(3, 8, 2, stride=1)
    use_patch_projection(policy.model)
    assert type(embedding.proj) is nn.Conv3d
