"""Sampling on a CPU, by csrc/sample_cpu.cpp.

The arguments of a call are packed in one go and passed as bytes, so that it takes only a few µs
besides the sampling itself.
"""

import struct
from array import array
from functools import lru_cache

import torch
from torch import Tensor

from ..layers.strides import adjacent
from ..native import DTYPES, status

_pack = struct.Struct("@5P6qd").pack
"""Packs `SampleArguments` of csrc/layers.h: five pointers, six integers, the temperature."""


def takes(logits: Tensor, uniform: Tensor) -> bool:
    """Tell whether the native kernel handles these logits (R, V) and uniform numbers (R,)."""
    return (
        logits.device.type == "cpu"
        and logits.dtype in DTYPES
        and logits.shape[1] > 0
        and uniform.dtype is torch.float32
        and status()[0] is not None
    )


@lru_cache
def _distinct(banned: tuple[int, ...]) -> array:
    """Return the ids in order, each once."""
    return array("q", sorted(set(banned)))


def sample(
    logits: Tensor, uniform: Tensor, temperature: float, banned: tuple[int, ...]
) -> tuple[Tensor, Tensor]:
    """`operations.sample`. Each row is one thread's, so that threads do not change its sums.

    Raises ValueError where `uniform` does not fit, IndexError for banned ids outside [0, V).
    """
    rows, v = logits.shape
    if uniform.shape != (rows,):
        raise ValueError(f"uniform {tuple(uniform.shape)} does not fit logits {(rows, v)}")
    ids = _distinct(banned)
    if ids and not (ids[0] >= 0 and ids[-1] < v):
        raise IndexError(f"banned ids {banned} are not all in [0, {v})")
    logits, uniform = adjacent(logits), uniform.contiguous()
    token = logits.new_empty((rows,), dtype=torch.int64)
    logp = logits.new_empty((rows,), dtype=torch.float32)
    address, count = ids.buffer_info()
    status()[0].mr1_sample(
        _pack(
            logits.data_ptr(), uniform.data_ptr(), address, token.data_ptr(), logp.data_ptr(),
            logits.stride(0), rows, v, count, DTYPES[logits.dtype], torch.get_num_threads(),
            temperature,
        )
    )  # fmt: skip
    return token, logp
