"""What a weight in 4 bits consists of: the tensors of bitsandbytes, read where they are."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class FourBitWeight:
    """A weight (N, D) in 4 bits; `absmax_code` and what follows exist with double quantisation."""

    packed: Tensor
    """(N·D/2,) uint8, two numbers a byte; the first one is in the high half."""
    code: Tensor
    """(16,) fp32, what the numbers stand for, before they are scaled."""
    absmax: Tensor
    """(N·D/block,) the scale of each block: fp32, or uint8 with double quantisation."""
    shape: tuple[int, int]
    """(N, D)."""
    block: int
    """Numbers that have one scale."""
    absmax_code: Tensor | None = None
    """(256,) fp32, what the numbers of `absmax` stand for, before they are scaled."""
    absmax_scale: Tensor | None = None
    """(blocks / absmax_block,) fp32."""
    absmax_offset: Tensor | None = None
    """() fp32, added to each scale."""
    absmax_block: int = 1
    """Scales that have one scale of their own."""

    @classmethod
    def of(cls, module: nn.Module) -> FourBitWeight | None:
        """Take the weight of bitsandbytes' Linear4bit; None for any other module.

        None, too, for a weight that bitsandbytes has packed in another order for its CPU product.
        """
        state = getattr(getattr(module, "weight", None), "quant_state", None)
        if state is None or getattr(state, "packing_format_for_cpu", False):
            return None
        if tuple(state.shape) != (module.out_features, module.in_features):
            return None
        second = state.state2 if state.nested else None
        return cls(
            packed=module.weight.data.view(-1).view(torch.uint8),
            code=_levels(state),
            absmax=state.absmax,
            shape=tuple(state.shape),
            block=state.blocksize,
            absmax_code=second.code if second else None,
            absmax_scale=second.absmax if second else None,
            absmax_offset=state.offset if second else None,
            absmax_block=second.blocksize if second else 1,
        )

    @property
    def nbytes(self) -> int:
        """Bytes of the packed numbers and their scales."""
        scales = self.absmax_scale.nbytes if self.absmax_scale is not None else 0
        return self.packed.nbytes + self.absmax.nbytes + scales


def _levels(state: object) -> Tensor:
    """Return the 16 levels of bitsandbytes' quant_state, in fp32.

    Weights that were quantised while another dtype was PyTorch's default have a rounded copy, which
    bitsandbytes itself does not read on a GPU.
    """
    if state.code.dtype is torch.float32:
        return state.code
    return _exact_levels(state.quant_type, state.code.device)


@lru_cache
def _exact_levels(quant_type: str, device: torch.device) -> Tensor:
    """Make the levels once for a device: a CUDA graph keeps their address."""
    from bitsandbytes.functional import get_4bit_type

    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.float32)
    try:
        return get_4bit_type(quant_type, device=device)
    finally:
        torch.set_default_dtype(default)
