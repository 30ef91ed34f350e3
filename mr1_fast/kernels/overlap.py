"""How far the kernels of a decode step run into one another: a launch setting of all of them."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from .tuned import architecture, tuned

CHUNK_BYTES = {True: 2048, False: 128}
"""Bytes of a chunk, which a thread prefetches: in bulk, from sm_90 on, or a cache line."""


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


def possible_overlaps(settings: Sequence[Overlap], device: torch.device) -> list[Overlap]:
    """Choose those of some settings that a device can run: dependent launches need sm_90."""
    arch = architecture(device) or ""
    if device.type == "cuda" and not arch.startswith("sm_"):
        return []
    dependent = device.type != "cuda" or _is_hopper_or_later(device)
    return [setting for setting in settings if dependent or not setting.dependent]


def overlap_options(
    overlap: Overlap,
    upcoming: Sequence[Tensor],
    device: torch.device,
    programs: int,
    warps: int = 4,
) -> dict[str, object]:
    """Return what a kernel that uses overlap_triton.py is launched with beside its own arguments.

    The weights `upcoming` are prefetched in order, as far as `prefetch_kib` goes, and a chunk for
    each thread: a kernel of few rows has few programs, which shall not be held up.
    """
    in_bulk = _is_hopper_or_later(device)
    chunk = CHUNK_BYTES[in_bulk]
    left = min(overlap.prefetch_kib * 1024 // chunk, programs * 32 * warps)
    weights, chunks = [], []
    for weight in upcoming:
        count = min(left, weight.nbytes // chunk)
        if count and weight.is_contiguous() and weight.data_ptr() % 16 == 0:
            weights.append(weight.view(-1).view(torch.uint8))
            chunks.append(count)
            left -= count
    launched_early = dict(launch_pdl=True) if overlap.dependent else {}
    return dict(
        UPCOMING=tuple(weights),
        CHUNKS=tuple(chunks),
        COUNT=len(weights),
        IN_BULK=in_bulk,
        LANES=32 * warps,
        DEPENDENT=overlap.dependent,
        **launched_early,
    )


def _is_hopper_or_later(device: torch.device) -> bool:
    arch = architecture(device) or ""
    return arch.startswith("sm_") and int(arch.removeprefix("sm_")) >= 90
