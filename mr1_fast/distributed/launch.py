"""How the processes that torchrun has started find one another."""

import os
from datetime import timedelta

import torch
import torch.distributed as dist

from .world import SINGLE, World

WAIT = timedelta(hours=24)
"""How long a process waits for small values of the others. One that has died is noticed at once,
since its connections end; the first one may be downloading a model."""


def is_first() -> bool:
    """Return whether this is the first process that torchrun has started, or the only one."""
    return os.environ.get("RANK", "0") == "0"


def join_world(device_type: str) -> World:
    """Join the processes that torchrun has started; the world of one where it has not.

    device_type: `cuda`, where gradients and weights go through NCCL, or `cpu`.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or "RANK" not in os.environ:
        return SINGLE
    local_rank = int(os.environ["LOCAL_RANK"])
    if device_type == "cuda":
        torch.cuda.set_device(local_rank)
    if not dist.is_initialized():
        dist.init_process_group("nccl" if device_type == "cuda" else "gloo")
    return World(
        rank=int(os.environ["RANK"]),
        size=size,
        local_rank=local_rank,
        local_size=int(os.environ.get("LOCAL_WORLD_SIZE", size)),
        control=dist.new_group(backend="gloo", timeout=WAIT),
    )


def work_alone(world: World) -> None:
    """Part from the other processes, which all do here: each then is alone for torch as well.

    transformers, for example, writes a model on the first process of a group only.
    """
    world.barrier()
    if world.size > 1:
        dist.destroy_process_group()
