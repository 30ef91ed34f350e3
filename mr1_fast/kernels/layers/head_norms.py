"""The norms of queries and keys, as the kernels read them."""

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

    @property
    def weights(self) -> tuple[Tensor, Tensor]:
        """The weights of queries and of keys."""
        return self.q, self.k

    def require_fitting(self, d: int) -> None:
        """Raise ValueError unless the weights are dense, and those of heads of d channels."""
        for weight in (self.q, self.k):
            if weight.shape != (d,) or weight.stride(0) != 1:
                raise ValueError(
                    f"a norm's weight {tuple(weight.shape)} with stride {weight.stride()} is not "
                    f"a dense one of {d} channels"
                )
