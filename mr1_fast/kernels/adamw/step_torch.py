"""The step of AdamW in PyTorch: what runs on a CPU, chunk by chunk."""

import torch
from torch import Tensor
from torch.nn.functional import pad

from .reference import adamw_ref, master_weight
from .rounding import (
    block_scale,
    decode_m,
    decode_v,
    encode_m,
    encode_v,
    more_bits,
    random_bits,
    round_stochastically,
    uniforms,
)
from .state import BLOCK, Scalars, State

CHUNK = 2**16
"""Elements of a chunk, a multiple of BLOCK, whose temporaries stay in the cache."""


def adamw_(
    weight: Tensor,
    gradient: Tensor,
    state: State,
    scalars: Scalars,
    keys: tuple[int, int],
    grad_scale: Tensor | None,
) -> None:
    """`step.adamw_` for flat tensors."""
    for first in range(0, len(weight), CHUNK):
        elements = slice(first, first + CHUNK)
        chunk = gradient[elements].float()
        if grad_scale is not None:
            chunk = chunk * grad_scale
        _adamw_chunk_(weight[elements], chunk, state.chunk(first, CHUNK), scalars, keys, first)


def add_stochastic_(accumulator: Tensor, gradient: Tensor, keys: tuple[int, int]) -> None:
    """`step.add_stochastic_` for flat tensors."""
    for first in range(0, len(accumulator), CHUNK):
        part = accumulator[first : first + CHUNK]
        total = part.float() + gradient[first : first + CHUNK]
        bits = random_bits(first, len(part), keys, part.device)
        part.copy_(round_stochastically(total, more_bits(bits)))


def _adamw_chunk_(
    weight: Tensor,
    gradient: Tensor,
    state: State,
    scalars: Scalars,
    keys: tuple[int, int],
    first: int,
) -> None:
    """Update n elements of a parameter, its elements `first` … `first` + n − 1."""
    n = len(weight)
    master = weight if state.remainder is None else master_weight(weight, state.remainder)
    m = decode_m(_blocks(state.m), state.m_scale[:, None])
    v = decode_v(_blocks(state.v), state.v_scale[:, None])
    master, m, v = adamw_ref(_blocks(master), _blocks(gradient), m, v, scalars)

    bits = random_bits(first, master.numel(), keys, weight.device)
    m_uniform, v_uniform = (uniform.view(-1, BLOCK) for uniform in uniforms(bits))
    m_scale, v_scale = block_scale(m), block_scale(v)
    state.m.copy_(encode_m(m, m_scale, m_uniform).view(-1)[:n])
    state.v.copy_(encode_v(v, v_scale, v_uniform).view(-1)[:n])
    state.m_scale.copy_(m_scale[:, 0])
    state.v_scale.copy_(v_scale[:, 0])

    master = master.view(-1)[:n]
    if state.remainder is not None:
        master_bits = master.view(torch.int32)
        high = (master_bits + 0x8000) >> 16
        weight.view(torch.int16).copy_(high)
        state.remainder.copy_(master_bits - (high << 16))
    elif weight.dtype == torch.bfloat16:
        weight.copy_(round_stochastically(master, more_bits(bits[:n])))
    else:
        weight.copy_(master)


def _blocks(x: Tensor) -> Tensor:
    """Convert n elements to fp32 and pad them with zeros to whole blocks: (⌈n/256⌉, 256)."""
    return pad(x.float(), (0, -len(x) % BLOCK)).view(-1, BLOCK)
