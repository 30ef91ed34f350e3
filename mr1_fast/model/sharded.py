"""A policy and its reference, spread over the processes of a run."""

from ..distributed import World
from ..distributed.optimizer_shards import OptimizerShards
from ..distributed.sharding import Replicated
from .policy import Policy
from .reference import Reference


def spread(policy: Policy, reference: Reference | None, kind: str, world: World) -> Replicated:
    """Spread policy and reference over the processes: `none`, `optimizer` or `full`."""
    if kind == "optimizer" and world.size > 1:
        return OptimizerShards(policy.model, world)
    return Replicated(policy.model, world)
