"""Norms of heads that tests of decode attention share."""

import torch
from torch import Tensor

from mr1_fast.kernels.layers.head_norms import HeadNorms


def head_norms(d: int, dtype: torch.dtype = torch.float32) -> HeadNorms:
    """Make norms of heads of d channels, whose weights differ by channel, and of q and k."""
    generator = torch.Generator().manual_seed(d)
    q, k = (torch.rand(2, d, generator=generator) + 0.5).to(dtype)
    return HeadNorms(q, k, 1e-6)


def exactly_normed(q: Tensor, k: Tensor, norms: HeadNorms) -> tuple[Tensor, Tensor]:
    """Norm queries and keys (R, heads, d) in fp64, by the definition."""

    def normed(x: Tensor, weight: Tensor) -> Tensor:
        return torch.nn.functional.rms_norm(x.double(), weight.shape, weight.double(), norms.eps)

    return normed(q, norms.q), normed(k, norms.k)
