"""How far the kernels of a decode step run into one another: a launch setting of all of them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .tuned import architecture, tuned

CHUNK_BYTES = {True: 2048, False: 128}
"""Bytes that a thread prefetches at a time: in bulk, from sm_90 on, or a cache line."""


class Overlap(NamedTuple):
    """What kernels of a decode step do while the memory would idle; by default nothing."""

    dependent: bool = False
    """Whether a kernel begins before the one before it has ended (CUDA from sm_90 on)."""
    prefetch_kib: int = 0
    """KiB of the weights that come next, which norms and attention each load into L2."""


NO_OVERLAP = Overlap()


def decode_overlap(device: torch.device) -> Overlap:
    """Return the setting for a GPU: that of the launch table, else none of it."""
    return tuned("decode_overlap", device, NO_OVERLAP)


def overlap_options(
    overlap: Overlap, upcoming: Sequence[Tensor], device: torch.device
) -> dict[str, object]:
    """Return what a kernel that uses overlap_triton.py is launched with beside its own arguments.

    The weights `upcoming` are prefetched in order, as far as `prefetch_kib` goes.
    """
    in_bulk = _prefetches_in_bulk(device)
    chunk, left = CHUNK_BYTES[in_bulk], overlap.prefetch_kib * 1024
    weights, chunks = [], []
    for weight in upcoming:
        count = min(left, weight.nbytes) // chunk
        if count and weight.is_contiguous():
            weights.append(weight.view(-1).view(torch.uint8))
            chunks.append(count)
            left -= count * chunk
    launched_early = dict(launch_pdl=True) if overlap.dependent else {}
    return dict(
        UPCOMING=tuple(weights),
        CHUNKS=tuple(chunks),
        COUNT=len(weights),
        IN_BULK=in_bulk,
        DEPENDENT=overlap.dependent,
        **launched_early,
    )


def _prefetches_in_bulk(device: torch.device) -> bool:
    arch = architecture(device) or ""
    return arch.startswith("sm_") and int(arch.removeprefix("sm_")) >= 90
