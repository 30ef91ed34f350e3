"""A policy and its reference, spread over the processes of a run."""

import dataclasses

import torch
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from ..config import TrainConfig
from ..config.train import check_sharding
from ..distributed import World
from ..distributed.optimizer_shards import OptimizerShards
from ..distributed.sharding import Sharding
from .device import resolve_device, resolve_dtype
from .fsdp import FullShards
from .policy import Policy
from .reference import Reference


def where_to_load(
    config: TrainConfig, kind: str, world: World
) -> tuple[TrainConfig, DeviceMesh | None]:
    """Return the settings to load the model by, and the devices that it is then cut onto.

    A model that a card cannot hold is loaded in host memory. None: it stays where it is loaded.
    UserError for settings with which weights cannot be cut.
    """
    if kind != "full" or world.size == 1:
        return config, None
    check_sharding(config)
    device, dtype = resolve_device(config), str(resolve_dtype(config)).removeprefix("torch.")
    return dataclasses.replace(config, device="cpu", dtype=dtype), device_mesh(device, world)


def device_mesh(device: torch.device, world: World) -> DeviceMesh:
    """Return the devices of all processes, which they make together."""
    return init_device_mesh(device.type, (world.size,))


def spread(
    policy: Policy,
    reference: Reference | None,
    kind: str,
    world: World,
    mesh: DeviceMesh | None = None,
    block: int = 1,
) -> Sharding:
    """Spread policy and reference over the processes: `none`, `optimizer` or `full`.

    mesh: the devices onto which `full` cuts weights, by default those that hold the policy.
    block: elements that must stay together, since the optimizer has one scale for their states.
    """
    if kind == "none" or world.size == 1:
        return Sharding(policy.model, world)
    if kind == "optimizer":
        return OptimizerShards(policy.model, world)
    mesh = mesh or device_mesh(policy.device, world)
    sharding = FullShards(policy.model, world, mesh, block)
    if reference is not None and reference.policy is not policy:
        reference.sharding = FullShards(reference.policy.model, world, mesh)
    elif reference is not None:
        reference.sharding = sharding
    return sharding
