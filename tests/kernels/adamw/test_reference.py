"""The square root of AdamW's equations is exact, which PyTorch's own on a CPU is not."""

import numpy as np
import torch

from mr1_fast.kernels.adamw.reference import exact_sqrt


def test_the_square_root_is_correctly_rounded():
    bits = torch.randint(0x7F800000, (2**20,), generator=torch.Generator().manual_seed(0))
    x = torch.cat([torch.arange(2**10), bits]).to(torch.int32).view(torch.float32)  # denormals too
    assert torch.equal(exact_sqrt(x), torch.from_numpy(np.sqrt(x.numpy())))
