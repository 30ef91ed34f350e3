"""How sweep.py checks a launch: sizes, outputs between canaries, errors in their bounds."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

CANARY, MARGIN = 0x5A, 4096
"""Byte around every output, and how many of them on each side."""


class Size(NamedTuple):
    """Rows and columns of the inputs (of AdamW: rows · columns elements), and the hidden size."""

    rows: int
    columns: int
    width: int = 0

    def __str__(self) -> str:
        return " × ".join(f"{each:,}" for each in self if each)


class Launch(NamedTuple):
    """A kernel on some inputs, with outputs of its own."""

    call: Callable[[tuple | None], object]
    """Launch with a setting; None: the default."""
    restore: Callable[[], object]
    """Undo what the last call wrote, and fill outputs with NaN."""
    errors: Callable[[], dict[str, Tensor]]
    """The largest error of each output of the last call, in units of its bound, 0-d."""


class Guards:
    """Outputs inside larger buffers, by which a write beyond them shows."""

    def __init__(self):
        self.buffers: list[Tensor] = []

    def like(self, tensor: Tensor) -> Tensor:
        """A contiguous tensor of this shape, dtype and device, with a margin on both sides."""
        size = tensor.numel() * tensor.element_size()
        buffer = torch.full((size + 2 * MARGIN,), CANARY, dtype=torch.uint8, device=tensor.device)
        self.buffers.append(buffer)
        return buffer[MARGIN : MARGIN + size].view(tensor.dtype).view(tensor.shape)

    def broken(self) -> Tensor:
        """inf if a byte of any margin has changed, else 0."""
        margins = [part for b in self.buffers for part in (b[:MARGIN], b[-MARGIN:])]
        changed = (torch.cat(margins) != CANARY).any()
        return torch.where(changed, torch.inf, 0.0)


def largest(error: Tensor, bound: float) -> Tensor:
    """The largest error in units of its bound; inf for NaN."""
    return (error.double().abs() / bound).nan_to_num(torch.inf, torch.inf).max()


def relative(ours: Tensor, exact: Tensor) -> Tensor:
    """Errors relative to their own exact values, or to 1e-7 of the largest."""
    return (ours.double() - exact).abs() / (exact.abs() + 1e-7 * exact.abs().max())
