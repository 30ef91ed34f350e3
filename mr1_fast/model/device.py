"""The device and the dtype that the settings mean, on this machine or on one that is planned."""

import socket

import torch

from .. import torchrun
from ..config import ModelConfig
from ..errors import UserError, shortened


def device_name(config: ModelConfig, has_cuda: bool) -> str:
    """Return the device's name, such as `cpu` or `cuda:1`, on a machine with or without CUDA."""
    if config.device == "auto":
        return "cuda" if has_cuda else "cpu"
    return config.device


def dtype_name(config: ModelConfig, device_type: str) -> str:
    """Return the name of the weights' dtype on a type of device, without asking the device.

    A card that is planned for is taken to have bfloat16; `resolve_dtype` asks that of this machine.
    """
    if config.dtype == "auto":
        return "bfloat16" if device_type == "cuda" else "float32"
    return config.dtype


def resolve_device(config: ModelConfig) -> torch.device:
    """Return the device that the settings mean on this machine.

    Each of several processes on a machine has the GPU of its number. Raises UserError for a device
    that torch cannot use.
    """
    name = device_name(config, torch.cuda.is_available())
    if torchrun.size() > 1:
        name = own_device(name, torch.cuda.device_count())
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError, ImportError) as error:  # a module of another vendor's
        raise UserError(
            f"device is {name}, which torch cannot use ({first_line(error)}): try --device cpu."
        ) from error
    return torch.device(name)


def own_device(name: str, gpus: int) -> str:
    """Return the device that `name` means for this process of several, on a machine of `gpus`.

    Raises UserError for a GPU that all of them would use, and for more processes than GPUs.
    """
    if name.startswith("cuda:"):
        raise UserError(
            f"device is {name}, but there are {torchrun.size()} processes, each of which has a GPU "
            "of its own: pass --device cuda, and choose GPUs with CUDA_VISIBLE_DEVICES."
        )
    if name != "cuda" or not gpus:
        return name
    if torchrun.local_size() > gpus:
        raise UserError(
            f"there are {torchrun.local_size()} processes on {socket.gethostname()}, which has "
            f"{gpus} GPU{'s' if gpus > 1 else ''}: lower --nproc-per-node, or pass --device cpu."
        )
    return f"cuda:{torchrun.local_rank()}"


def resolve_dtype(config: ModelConfig) -> torch.dtype:
    """Return the dtype that the settings mean on this machine.

    `auto` is float16 on a CUDA card without units for bfloat16, such as a T4 or a V100: torch
    computes bfloat16 there as well, but slowly.
    """
    if config.dtype != "auto":
        return getattr(torch, config.dtype)
    device = resolve_device(config)
    if device.type == "cuda" and torch.cuda.get_device_capability(device) < (8, 0):
        return torch.float16
    return getattr(torch, dtype_name(config, device.type))


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, shortened and without its full stop, or its
    type's name."""
    line = (str(error).strip().splitlines() or [type(error).__name__])[0]
    return shortened(line.rstrip("."), 200)
