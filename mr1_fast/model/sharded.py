"""A policy and its reference, spread over the processes of a run."""

from ..distributed import World
from ..distributed.sharding import Replicated
from .policy import Policy
from .reference import Reference


def spread(policy: Policy, reference: Reference | None, kind: str, world: World) -> Replicated:
    """Spread policy and reference over the processes: `none`, `optimizer` or `full`."""
    return Replicated(policy.model, world)
