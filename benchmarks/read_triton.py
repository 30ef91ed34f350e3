"""A kernel that only reads: the ceiling of what an operation that writes next to nothing can reach.

torch.sum converts and adds in several instructions an element; this kernel has one instruction for
each 4 bytes, and 64 KB of loads in flight in each program.
"""

import torch
import triton
import triton.language as tl

BLOCK = 4096
"""Words of 32 bits that a program loads at a time, 16 a thread: four loads of 128 bits."""
BLOCKS = 4
"""Blocks of a program; their loads do not wait for each other."""


@triton.jit
def _read_kernel(X, OUT, n, BLOCK: tl.constexpr, BLOCKS: tl.constexpr):
    start = tl.program_id(0).to(tl.int64) * BLOCK * BLOCKS
    total = tl.zeros((BLOCK,), tl.int32)
    for i in tl.static_range(BLOCKS):
        offsets = start + i * BLOCK + tl.arange(0, BLOCK)
        total ^= tl.load(X + offsets, mask=offsets < n, other=0)
    tl.store(OUT + tl.program_id(0), tl.xor_sum(total))


def read(words: torch.Tensor) -> torch.Tensor:
    """Read a flat int32 tensor once; return the XOR of each program's words."""
    programs = triton.cdiv(len(words), BLOCK * BLOCKS)
    out = words.new_empty(programs)
    _read_kernel[(programs,)](words, out, len(words), BLOCK=BLOCK, BLOCKS=BLOCKS, num_warps=8)
    return out
