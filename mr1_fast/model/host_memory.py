"""Weights in memory that the processes of a machine share, page-locked where a GPU reads them.

The memory is a file without a name (Linux's memfd), which ends with its last process: whenever one
is killed, nothing is left behind, and the size of /dev/shm, 64 MB in many containers, is no limit.
"""

import ctypes
import mmap
import os
import weakref
from collections.abc import Iterable, Sequence
from contextlib import suppress
from itertools import accumulate

import torch
from torch import Tensor

from ..distributed import World
from ..errors import UserError

ALIGNMENT = 256
"""Each tensor begins at a multiple of so many bytes, as in memory that CUDA allocates."""


def can_share(world: World) -> bool:
    """Whether there are other processes, and a system that lets them share memory by this file."""
    return world.size > 1 and hasattr(os, "memfd_create")


def shared_copies(tensors: Sequence[Tensor], world: World) -> list[Tensor]:
    """Copy tensors, which are equal in all processes, to memory that those of a machine share.

    All processes call it. The first of each machine writes the copies, and the others map them, so
    nobody must change them. Those of tensors on CUDA are page-locked, by each process for itself,
    or pageable where CUDA cannot do that. UserError in all processes if one has no room.
    """
    *starts, size = accumulate(map(_room, tensors), initial=0)
    pages, descriptor, problem = None, -1, ""
    try:
        if world.local_rank == 0:
            try:
                descriptor = os.memfd_create("mr1_fast_reference")
                pages = _mapped(descriptor, size, reserve=True)
            except OSError as error:
                problem = f"there is no room for {size / 2**30:.1f} GiB ({error.strerror})"
            else:
                _fill(pages, starts, tensors)
        # torchrun numbers the processes of a machine in a row, from its first one on.
        first = world.rank - world.local_rank
        made = world.gather((problem, f"/proc/{os.getpid()}/fd/{descriptor}"))
        _require_none(problem for problem, _ in made)
        if pages is None:
            try:
                descriptor = os.open(made[first][1], os.O_RDWR)
                pages = _mapped(descriptor, size)
            except OSError as error:
                problem = f"a process cannot map that of its machine's first ({error.strerror})"
        # The first one keeps the file open until all others have mapped it.
        _require_none(world.gather(problem))
    finally:
        if descriptor >= 0:
            os.close(descriptor)
    if any(tensor.is_cuda for tensor in tensors):
        _page_lock(pages)
    return _views(pages, starts, tensors)


def _room(tensor: Tensor) -> int:
    """Return the bytes that a tensor takes with what aligns the next one."""
    return -(-tensor.nbytes // ALIGNMENT) * ALIGNMENT


def _mapped(descriptor: int, size: int, reserve: bool = False) -> ctypes.Array:
    """Map a file of `size` bytes, which `reserve` gives it first.

    A page that cannot be had later would end the process by a signal, an error now does not.
    """
    if reserve:
        os.posix_fallocate(descriptor, 0, max(1, size))
    mapping = mmap.mmap(descriptor, max(1, size))
    return (ctypes.c_char * len(mapping)).from_buffer(mapping)


def _fill(pages: ctypes.Array, starts: Sequence[int], tensors: Sequence[Tensor]) -> None:
    for target, tensor in zip(_views(pages, starts, tensors), tensors, strict=True):
        target.copy_(tensor.detach())


def _views(pages: ctypes.Array, starts: Sequence[int], like: Sequence[Tensor]) -> list[Tensor]:
    """Return tensors in `pages`, each from its start on, with these shapes and dtypes."""
    whole = torch.frombuffer(pages, dtype=torch.uint8)
    return [
        whole[start : start + tensor.nbytes].view(tensor.dtype).view(tensor.shape)
        for start, tensor in zip(starts, like, strict=True)
    ]


def _page_lock(pages: ctypes.Array) -> None:
    """Page-lock memory until the last tensor in it is gone; it stays pageable if CUDA cannot."""
    address, runtime = ctypes.addressof(pages), torch.cuda.cudart()
    if int(runtime.cudaHostRegister(address, len(pages), 0)) == 0:
        # The array goes before its mapping does. At the end of the process the driver unlocks it.
        weakref.finalize(pages, runtime.cudaHostUnregister, address).atexit = False
        return
    with suppress(RuntimeError):  # CUDA remembers the error, and reports it of the next launch
        torch.ones(1, device="cuda")


def _require_none(problems: Iterable[str]) -> None:
    """Raise UserError for the first problem that a process has told, in all of them."""
    for problem in filter(None, problems):
        raise UserError(
            f"reference is offload, whose weights the processes of a machine share in host memory, "
            f"but {problem}: give them more memory, or pass --reference 8bit or resident."
        )
