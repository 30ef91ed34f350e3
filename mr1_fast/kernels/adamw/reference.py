"""x"""

import torch
from torch.nn.functional import pad

from .rounding import (
    block_scale,
    decode_m,
    decode_v,
    encode_m,
    encode_v,
    more_bits,
    random_bits,
    round_stochastically,
    sqrt_,
    uniforms,
)
from .state import BLOCK, Scalars, State


def adamw_ref(
    weight: torch.Tensor, gradient: torch.Tensor, m: torch.Tensor, v: torch.Tensor, scalars: Scalars
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """The new weight, m and v of whole blocks, (blocks, 256) in fp32, before any rounding."""
    m = m * scalars.beta1 + gradient * scalars.one_minus_beta1
    v = v * scalars.beta2 + gradient * scalars.one_minus_beta2 * gradient
    smallest = decode_v(torch.ones_like(v[:, :1]), block_scale(v))
    denominator = sqrt_(torch.maximum(v, smallest) * scalars.inverse_correction2) + scalars.eps
    ratio = (m * scalars.inverse_correction1 / denominator).clamp_(-scalars.limit, scalars.limit)
    return weight - (weight * scalars.weight_decay + ratio) * scalars.lr, m, v


def master_weight(weight: torch.Tensor, remainder: torch.Tensor) -> torch.Tensor:
    """The fp32 weight, in the shape of the bf16 `weight`, that it and its remainder stand for."""
    high = weight.view(torch.int16).to(torch.int32) << 16
    return (high + remainder.view(weight.shape)).view(torch.float32)


def _adamw_chunk(
    weight, gradient, state: State, scalars: Scalars, keys, grad_scale, first: int
) -> None:
    n = len(weight)
    whole = lambda x: pad(x, (0, -n % BLOCK)).view(-1, BLOCK)  # noqa: E731
    gradient = whole(gradient.float())
    if grad_scale is not None:
        gradient = gradient * grad_scale
    master = weight if state.remainder is None else master_weight(weight, state.remainder)
    m = decode_m(whole(state.m).float(), state.m_scale[:, None])
    v = decode_v(whole(state.v).float(), state.v_scale[:, None])
    master, m, v = adamw_ref(whole(master.float()), gradient, m, v, scalars)

    bits = random_bits(first, gradient.numel(), keys, weight.device)
    m_uniform, v_uniform = (u.view(-1, BLOCK) for u in uniforms(bits))
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
