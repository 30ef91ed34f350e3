"""Several processes, one for each GPU, that train together under `torchrun` (docs/distributed.md).

`World` is who they are and how they exchange small values; `sharding.py` says which part of the
weights and the optimizer each of them holds.
"""

from .world import SINGLE, World

__all__ = ["SINGLE", "World"]
