"""The norms of queries and keys, as the decode kernels read them."""

from typing import NamedTuple

from torch import Tensor


class HeadNorms(NamedTuple):
    """RMS norms over the channels of each head, before the rotation.

    A head is normed as a layer's hidden states are: with statistics in fp32, the normed value
    rounded to its dtype, and its product with the weight rounded again.
    """

    q: Tensor
    """(d,) the weight of queries, in the model's dtype."""
    k: Tensor
    """(d,) the weight of keys."""
    eps: float
